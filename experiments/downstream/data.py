"""Data to train on, to choose parameters by, and to shift to."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from experiments.datasets.examples import Examples, Taken, Texts, evenly
from experiments.datasets.loaders import Batch, Transform, loader
from experiments.datasets.prepare import Coder, Prepared, prepare
from experiments.datasets.tasks import Task, load_task
from experiments.datasets.text import encode, tokenizer_for
from experiments.downstream.presets import SMALL_SIDE, Preset, patch_of

# Of everything but training: one size compiles once.
BATCH = 64
# Of the training split, to choose by: a tenth, but no more than this.
MOST_HELD_OUT = 15 * BATCH

Source = Mapping[str, np.ndarray] | Examples


class Data(NamedTuple):
  """A data set, its training split in two.

  Attributes:
    prepared: the data set; `test` is its own.
    train: what is trained on.
    held_out: the rest of the training split, to choose the best parameters by.
  """

  prepared: Prepared
  train: Source
  held_out: Source


def load(
  task: Task,
  preset: Preset,
  cache: pathlib.Path,
  test_limit: int | None = None,
  coder: Coder | None = None,
) -> Data:
  """Encodes or decodes a data set, and holds out a part of its training split.

  Raises:
    ValueError: if the training split has fewer than ten examples; or see `prepare`.
  """
  prepared = prepare(
    task,
    length=preset.length,
    vocabulary=preset.vocabulary,
    image_size=image_size_of(task, preset),
    cache=cache,
    limit_test=test_limit,
    keep=preset.keep,
    coder=coder,
  )
  count = count_of(prepared.train)
  if count < 10:
    raise ValueError(f"{task.name}: {count} training examples, expected at least 10")
  held_out = min(MOST_HELD_OUT, count // 10)
  held_out -= held_out % BATCH if held_out > BATCH else 0
  # The same for all seeds, of which the models differ.
  order = np.random.default_rng(0).permutation(count)
  return Data(
    prepared,
    take(prepared.train, np.sort(order[held_out:])),
    take(prepared.train, np.sort(order[:held_out])),
  )


def image_size_of(task: Task, preset: Preset) -> int | None:
  """The preset's, or `None` for small square images, all alike, that patches divide."""
  if task.kind == "text":
    return None
  if task.sizes_differ:
    return preset.image_size
  height, width, _ = task.train[0]["input"].shape
  fits = height == width <= SMALL_SIDE and not height % patch_of(preset, height)
  return None if fits else preset.image_size


def count_of(source: Source) -> int:
  """Number of examples."""
  return len(source["label"]) if isinstance(source, Mapping) else len(source)


def take(source: Source, indices: np.ndarray) -> Source:
  """Some examples, in the order of `indices`."""
  if isinstance(source, Mapping):
    return {name: array[indices] for name, array in source.items()}
  return Taken(source, indices)


def training_batches(data: Data, batch_size: int, seed: int):
  """An endless iterator of shuffled, augmented batches, with a state to go on from."""
  transform = data.prepared.train_transform
  return loader(data.train, batch_size, seed=seed, transform=transform)


def ordered_batches(source: Source, transform: Transform | None) -> Iterator[Batch]:
  """Every example once, in order, in batches of `BATCH` but for the last."""
  return loader(source, BATCH, seed=0, shuffle=False, epochs=1, transform=transform)


def whole_batches(
  source: Source, transform: Transform | None, count: int
) -> list[Batch]:
  """Unlabelled inputs, at most `count` of them spread evenly, in equal batches.

  Fewer than two batches of `BATCH` are made two smaller ones.
  """
  there = count_of(source)
  count = min(count, there)
  size = min(BATCH, count // 2)
  count -= count % size
  spread = np.arange(count) * there // count
  found = loader(
    take(source, spread), size, seed=0, shuffle=False, epochs=1, transform=transform
  )
  return [
    {name: part for name, part in batch.items() if name != "label"} for batch in found
  ]


def foreign_task(name: str, task: Task, data_dir: pathlib.Path | None) -> Task:
  """Another data set, whose inputs the teacher of `task` can read.

  Raises:
    ValueError: if it is of another kind, or its images have other channels; or see
      `load_task`.
  """
  other = load_task(name, data_dir=data_dir)
  if other.kind != task.kind:
    raise ValueError(f"{name} holds {other.kind}s: {task.name} holds {task.kind}s")
  if task.kind == "image":
    found, own = (each.train[0]["input"].shape[-1] for each in (other, task))
    if found != own:
      raise ValueError(f"{name} has images of {found} channels: {task.name} has {own}")
  return other


def foreign_batches(
  other: Task,
  task: Task,
  data: Data,
  preset: Preset,
  cache: pathlib.Path,
  coder: Coder | None = None,
) -> list[Batch]:
  """Training inputs of another data set, as the teacher of this one reads them.

  Texts are encoded by the teacher's tokenizer, images standardised by its statistics.
  """
  if task.kind == "text":
    texts = texts_of(other.train)
    chosen = [texts[i] for i in evenly(texts, preset.calibration)]
    if coder is None:
      own = texts_of(task.train)
      tokenizer = tokenizer_for(own, preset.vocabulary, cache, name=task.name)
      ids, valid = encode(tokenizer, chosen, preset.length, keep=preset.keep)
    else:
      ids, valid = coder(chosen)
    return whole_batches(
      {"ids": ids, "valid": valid, "label": np.zeros(len(ids), np.int32)},
      None,
      preset.calibration,
    )
  assert data.prepared.image_shape is not None
  found = prepare(
    other,
    length=preset.length,
    vocabulary=preset.vocabulary,
    image_size=data.prepared.image_shape[0],
    cache=cache,
    limit_train=preset.calibration,
    limit_test=1,
  )
  return whole_batches(found.train, data.prepared.test_transform, preset.calibration)


def texts_of(examples: Examples) -> list[str]:
  """All texts of a split."""
  if isinstance(examples, Texts):
    return examples.texts
  return [examples[i]["input"] for i in range(len(examples))]
