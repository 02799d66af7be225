"""Every attention of a frozen teacher replaced by others, without retraining.

Is a compiled operator closer to the teacher than cut Sinkhorn in equal time?
"""
