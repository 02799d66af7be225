"""Time and memory of attentions, of their parts and of training steps.

Against the length, with softmax and Sinkhorn in their fastest forms as rivals.
"""
