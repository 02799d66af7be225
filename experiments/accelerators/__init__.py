"""What XLA makes of attentions for accelerators, compiled on a machine without one.

Memory, code and operations are known before anything runs; times are not.
"""
