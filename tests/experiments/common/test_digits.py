"""scikit-learn's digits: their split, batches and shifts."""

import numpy as np
import pytest

from experiments.common.digits import batches_of, digits, shift_digits


def test_digits_are_split_by_seed_without_overlap():
  first, again, other = digits(0), digits(0), digits(1)
  assert first.train.inputs.shape == (1437, 64, 1)
  assert first.test.inputs.shape == (360, 64, 1)
  np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
  assert not np.array_equal(first.test.inputs, other.test.inputs)
  assert set(first.train.labels) == set(range(10))
  assert 0.0 <= first.train.inputs.min() < first.train.inputs.max() == 1.0


def test_shifted_digits_are_moved_by_a_pixel_at_most():
  image = np.zeros((1, 8, 8), np.float32)
  image[0, 3, 4] = 1.0
  rng = np.random.default_rng(0)
  places = set()
  for _ in range(100):
    moved = shift_digits(image.reshape(1, 64, 1), rng).reshape(8, 8)
    assert moved.sum() == 1.0
    places.add(tuple(map(int, np.argwhere(moved)[0])))
  assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_batches_are_whole():
  batches = batches_of(np.arange(10), 4)
  np.testing.assert_array_equal(batches, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize("size", [4, 5, 20])
def test_batches_that_keep_the_rest_hold_everything(size):
  batches = batches_of(np.arange(10), size, keep_rest=True)
  np.testing.assert_array_equal(np.concatenate(batches), np.arange(10))
  assert {len(batch) for batch in batches[:-1]} <= {size}
