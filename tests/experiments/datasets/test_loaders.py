"""Batches: what is in them, and going on from a state."""

import json

import numpy as np
import pytest
from helpers.tfds_sets import (
  assert_same,
  take,
)

from experiments.datasets.loaders import loader

COUNT = 10


@pytest.fixture
def arrays():
  ids = np.arange(COUNT * 3, dtype=np.int32).reshape(COUNT, 3)
  return {"ids": ids, "valid": ids % 3 < 2, "label": np.arange(COUNT, dtype=np.int32)}


def labels_of(batches):
  return np.concatenate([batch["label"] for batch in batches])


def test_batches_are_rows_of_the_arrays(arrays):
  for batch in take(loader(arrays, 4, seed=0), 6):
    assert {name: (b.shape, b.dtype) for name, b in batch.items()} == {
      "ids": ((4, 3), np.int32),
      "valid": ((4, 3), np.bool_),
      "label": ((4,), np.int32),
    }
    for name, array in arrays.items():
      np.testing.assert_array_equal(batch[name], array[batch["label"]])


def test_every_epoch_has_all_examples_in_an_order_of_its_own(arrays):
  labels = labels_of(take(loader(arrays, 4, seed=0), 15)).reshape(6, COUNT)
  assert (np.sort(labels) == np.arange(COUNT)).all()
  assert len(np.unique(labels, axis=0)) == 6
  other = labels_of(take(loader(arrays, 4, seed=1), 15)).reshape(6, COUNT)
  assert (labels != other).any(1).all()
  again = labels_of(take(loader(arrays, 4, seed=0), 15)).reshape(6, COUNT)
  np.testing.assert_array_equal(labels, again)


@pytest.mark.parametrize("drop", [False, True])
def test_one_epoch_in_order(arrays, drop):
  options = {"seed": 0, "shuffle": False, "epochs": 1, "drop_remainder": drop}
  batches = list(loader(arrays, 4, **options))
  assert [len(batch["label"]) for batch in batches] == ([4, 4] if drop else [4, 4, 2])
  np.testing.assert_array_equal(labels_of(batches), np.arange(8 if drop else COUNT))


def test_batches_may_be_larger_than_the_set(arrays):
  (batch,) = take(loader(arrays, 25, seed=0), 1)
  assert sorted(np.bincount(batch["label"])) == [2] * 5 + [3] * 5


def test_numbers_of_a_transform_depend_on_the_batch_alone(arrays):
  def transform(batch, rng):
    return batch | {"drawn": rng.integers(1000, size=3)}

  every = take(loader(arrays, 4, seed=0, transform=transform), 8)
  assert len({tuple(batch["drawn"]) for batch in every}) == 8
  assert_same(take(loader(arrays, 4, seed=0, transform=transform), 8), every)
  other = take(loader(arrays, 4, seed=1, transform=transform), 1)
  assert (other[0]["drawn"] != every[0]["drawn"]).any()


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7, 12])
def test_going_on_from_a_state(arrays, done):
  """The state is taken in the middle of epochs, at their ends and across them."""

  def transform(batch, rng):
    return batch | {"noise": rng.normal(size=len(batch["label"]))}

  def start():
    return loader(arrays, 4, seed=5, transform=transform)

  iterator = start()
  take(iterator, done)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 9)
  resumed = start()
  take(resumed, 3)  # where it was does not matter
  resumed.set_state(state)
  assert_same(take(resumed, 9), expected)
  assert resumed.get_state() == iterator.get_state()


def test_end_of_a_resumed_epoch(arrays):
  def start():
    return loader(arrays, 4, seed=5, epochs=2)

  iterator = start()
  take(iterator, 3)
  resumed = start()
  resumed.set_state(iterator.get_state())
  assert_same(list(resumed), list(iterator))
  assert list(resumed) == []


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ({"seed": -1}, "seed=-1: expected 0 to"),
    ({"seed": 2**32}, "seed=4294967296: expected 0 to"),
    ({"epochs": 0}, "epochs=0: expected at least 1, or None"),
    ({"examples": {}}, "examples: got no"),
    ({"examples": []}, "examples: got none"),
    ({"examples": {"ids": np.zeros((0, 3))}}, "examples: got none"),
    (
      {"examples": {"ids": np.zeros((2, 3)), "label": np.zeros(3)}},
      r"expected arrays of one length, got \{'ids': 2, 'label': 3\}",
    ),
    ({"examples": [{"input": "a", "label": 0}]}, "examples: got texts; encode them"),
  ],
)
def test_errors_of_the_loader(arrays, options, message):
  with pytest.raises(ValueError, match=message):
    loader(**({"examples": arrays, "batch_size": 4, "seed": 0} | options))
