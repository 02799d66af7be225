"""Data sets from TFDS, as arrays and batches."""
