"""Transformers trained on texts or images, and their attention replaced.

How much of a trained teacher's accuracy does each operator keep?
"""
