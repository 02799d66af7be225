"""Starts of Sinkhorn's iterations compared."""
