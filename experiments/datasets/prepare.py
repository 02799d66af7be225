"""Data sets as the arrays that models read."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from experiments.datasets.augment import augment, standardise
from experiments.datasets.examples import Examples, Texts, evenly
from experiments.datasets.images import decode, fit, statistics
from experiments.datasets.loaders import Transform
from experiments.datasets.tasks import Task
from experiments.datasets.text import encode, tokenizer_for


class Coder(Protocol):
  """Texts to token ids int32 `[texts, length]`, and which are no padding."""

  @property
  def vocabulary_size(self) -> int:
    """Number of tokens."""

  def __call__(self, texts: Sequence[str], /) -> tuple[np.ndarray, np.ndarray]:
    """See the class."""


class Prepared(NamedTuple):
  """A data set for `experiments.datasets.loaders.loader`.

  Texts: `ids` int32 and `valid` bool [examples, length]. Images: `image` uint8
  [examples, height, width, channels], or, where these would not fit, a sequence that
  decodes. Either with `label` int32 [examples].

  Attributes:
    vocabulary_size: of texts' tokens, or None.
    length: tokens of a text, or None.
    image_shape: height, width and channels, or None.
    mean: of the training images' channels [channels] in [0, 1], or None.
    std: their standard deviation, or None.
    flip: whether a mirrored image keeps its label.
  """

  name: str
  kind: Literal["text", "image"]
  train: Mapping[str, np.ndarray] | Examples
  test: Mapping[str, np.ndarray] | Examples
  classes: int
  label_names: tuple[str, ...]
  vocabulary_size: int | None = None
  length: int | None = None
  image_shape: tuple[int, int, int] | None = None
  mean: np.ndarray | None = None
  std: np.ndarray | None = None
  flip: bool = False

  @property
  def train_transform(self) -> Transform | None:
    """The transform that `loader` applies to training batches."""
    if self.kind == "text":
      return None
    assert self.mean is not None
    assert self.std is not None
    return augment(self.mean, self.std, flip=self.flip)

  @property
  def test_transform(self) -> Transform | None:
    """The transform that `loader` applies to batches for evaluation."""
    if self.kind == "text":
      return None
    assert self.mean is not None
    assert self.std is not None
    return standardise(self.mean, self.std)


def prepare(
  task: Task,
  *,
  length: int,
  vocabulary: int,
  image_size: int | None = None,
  cache: pathlib.Path,
  limit_train: int | None = None,
  limit_test: int | None = None,
  keep: Literal["start", "end", "both"] = "start",
  coder: Coder | None = None,
) -> Prepared:
  """Encodes all texts, or decodes all images, of a data set.

  Args:
    task: the data set.
    length: tokens of a text; shorter ones are padded, longer ones cut.
    vocabulary: tokens at most that are learned from the training texts.
    image_size: height and width that images are scaled and, about their centre, cut
      to; None if they have one size already.
    cache: directory for the tokenizer, the only thing that is kept.
    limit_train: examples at most, drawn evenly from the whole split.
    limit_test: as `limit_train`.
    keep: the end of texts that stays, if they are cut.
    coder: of a pretrained encoder, in the place of a tokenizer of the training texts;
      it knows the length and the end that stays.

  Raises:
    ValueError: if a number is not positive, images differ in size and `image_size` is
      None, or an example cannot be read.
  """
  limits = {"limit_train": limit_train, "limit_test": limit_test}
  for name, value in {**limits, "image_size": image_size}.items():
    if value is not None and value < 1:
      raise ValueError(f"{name}={value}: expected at least 1, or None")
  train = evenly(task.train, limit_train)
  test = evenly(task.test, limit_test)
  if task.kind == "text":
    texts, labels = _texts(task.train, train)
    test_texts, test_labels = _texts(task.test, test)
    code: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    if coder is None:
      tokenizer = tokenizer_for(texts, vocabulary, cache, name=task.name)
      code = functools.partial(encode, tokenizer, length=length, keep=keep)
      size = tokenizer.get_vocab_size()
    else:
      code, size = coder, coder.vocabulary_size
    splits = []
    for strings, classes in ((texts, labels), (test_texts, test_labels)):
      ids, valid = code(strings)
      splits.append({"ids": ids, "valid": valid, "label": classes})
    return Prepared(
      task.name,
      "text",
      splits[0],
      splits[1],
      task.classes,
      task.label_names,
      size,
      length,
    )
  first = fit(task.train[train[0]]["input"], image_size)
  images = [
    decode(examples, indices, image_size, first.shape, f"{task.name}, {role} split")
    for examples, indices, role in (
      (task.train, train, "training"),
      (task.test, test, "test"),
    )
  ]
  mean, std = statistics(images[0])
  return Prepared(
    task.name,
    "image",
    images[0],
    images[1],
    task.classes,
    task.label_names,
    image_shape=first.shape,
    mean=mean,
    std=std,
    flip=task.flip,
  )


def _texts(examples: Examples, indices: np.ndarray) -> tuple[list[str], np.ndarray]:
  if isinstance(examples, Texts):
    return [examples.texts[i] for i in indices], examples.labels[indices]
  rows = [examples[i] for i in indices]
  return [row["input"] for row in rows], np.array([r["label"] for r in rows], np.int32)
