"""Batches of a data set through Grain, with a state to go on from."""

from collections.abc import Callable, Mapping

import grain
import numpy as np

from experiments.datasets.examples import Examples, read_many

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, np.random.Generator], Batch]


def loader(
  examples: Examples | Mapping[str, np.ndarray],
  batch_size: int,
  *,
  seed: int,
  shuffle: bool = True,
  epochs: int | None = None,
  transform: Transform | None = None,
  drop_remainder: bool = False,
) -> grain.DatasetIterator:
  """An iterator over batches, dicts of arrays with a leading axis of `batch_size`.

  Images come as float32 in [0, 1]; everything else as it is. Batches reach across the
  ends of epochs, each of which has its own order; only the last one of all may be
  smaller. The iterator's `get_state()` is a small dict that JSON can hold, and
  `set_state()` of an iterator from equal arguments goes on with the batches after it.

  Args:
    examples: arrays of one length, or images as `experiments.datasets.tasks` gives
      them, which are decoded at each read.
    batch_size: examples in a batch.
    seed: of the order and of `transform`, from 0 to 2**32 - 1.
    shuffle: False for the examples' own order.
    epochs: None for no end.
    transform: changes a batch, at random if it likes; the generator depends on `seed`
      and on the number of the batch alone.
    drop_remainder: leaves out a last batch that is not full.

  Raises:
    ValueError: if a number is out of range, arrays differ in length, or `examples` are
      texts, which have to be encoded first.
  """
  count = _count(examples)
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size}: expected at least 1")
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed={seed}: expected 0 to 2**32 - 1")
  if epochs is not None and epochs < 1:
    raise ValueError(f"epochs={epochs}: expected at least 1, or None for no end")
  # Grain orders indices, whose examples are gathered together: much less work than
  # passing on every example.
  dataset = grain.MapDataset.range(count).seed(seed)
  if shuffle:
    dataset = dataset.shuffle()
  dataset = dataset.repeat(epochs).batch(
    batch_size, drop_remainder=drop_remainder, batch_fn=np.asarray
  )
  dataset = dataset.map(lambda indices: _gather(examples, indices))
  if transform is not None:
    dataset = dataset.random_map(transform)
  # Read when asked for: no threads, so that a process can end at any time.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(dataset.to_iter_dataset(options))


def _count(examples: Examples | Mapping[str, np.ndarray]) -> int:
  if isinstance(examples, Mapping):
    lengths = {name: len(array) for name, array in examples.items()}
    if len(set(lengths.values())) > 1:
      raise ValueError(f"examples: expected arrays of one length, got {lengths}")
    count = next(iter(lengths.values()), 0)
  else:
    count = len(examples)
    if count and isinstance(examples[0]["input"], str):
      raise ValueError("examples: got texts; encode them, as `prepare` does")
  if not count:
    raise ValueError("examples: got none")
  return count


def _gather(
  examples: Examples | Mapping[str, np.ndarray], indices: np.ndarray
) -> Batch:
  if isinstance(examples, Mapping):
    batch = {name: array[indices] for name, array in examples.items()}
  else:
    rows = list(read_many(examples, indices))
    batch = {
      "image": np.stack([row["input"] for row in rows]),
      "label": np.array([row["label"] for row in rows], np.int32),
    }
  image = batch.get("image")
  if image is not None and image.dtype == np.uint8:
    batch["image"] = image / np.float32(255)
  return batch
