"""Starts of Sinkhorn's iterations compared, sliced and learned ones among them.

How many iterations does each leave to a tolerance, on problems between clouds?
"""
