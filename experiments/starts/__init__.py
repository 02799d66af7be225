"""Starts of Sinkhorn attention: zero and Gaussian, unlearned.

How close are a few iterations from each to the converged plan, what does a start take,
and what does a model that was trained with it have?
"""
