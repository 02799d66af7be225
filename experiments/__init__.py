"""Experiments: each runs as `python -m experiments.NAME --out DIR`.

They import `common` and `datasets`, but never each other.
"""
