"""Data sets of TFDS as arrays and batches; no experiment, but read by some."""
