"""scikit-learn's digits as arrays, in batches, and shifted."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Split(NamedTuple):
  """Inputs `[examples, ...]` and integer labels `[examples]`."""

  inputs: np.ndarray
  labels: np.ndarray


class Dataset(NamedTuple):
  """A data set for classification."""

  train: Split
  test: Split


def digits(seed: int) -> Dataset:
  """scikit-learn's 8 x 8 digits, every pixel a token of one feature in [0, 1].

  Inputs are `[examples, 64, 1]`. A fifth of the 1,797 images, drawn by `seed` with
  equal shares of the classes, is the test set.
  """
  images, labels = load_digits(return_X_y=True)
  images = (images / 16.0).astype(np.float32)[..., None]
  parts = train_test_split(
    images, labels.astype(np.int32), test_size=0.2, random_state=seed, stratify=labels
  )
  train_inputs, test_inputs, train_labels, test_labels = parts
  return Dataset(Split(train_inputs, train_labels), Split(test_inputs, test_labels))


def shift_digits(inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Digits `[batch, 64, ...]` moved by up to one pixel each way, padded with zeros."""
  images = inputs.reshape(len(inputs), 8, 8)
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
  down, right = rng.integers(3, size=(2, len(inputs)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (8, 8), axis=(1, 2))
  return windows[np.arange(len(inputs)), down, right].reshape(inputs.shape)


def batches_of(
  inputs: np.ndarray, size: int, *, keep_rest: bool = False
) -> list[np.ndarray]:
  """Inputs in order, in batches of one size.

  What does not fill a batch is left out, so that calibration compiles for one shape;
  `keep_rest` makes it a smaller last batch, for measuring.
  """
  stop = len(inputs) if keep_rest else len(inputs) - size + 1
  return [inputs[start : start + size] for start in range(0, stop, size)]
