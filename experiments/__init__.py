"""Experiments: each module runs as `python -m experiments.<name> --out DIR`."""
