"""Labelled texts and images with random access."""

import io
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

_CHUNK = 1024  # records read in one call
_EMPTY = 0.01  # share of a split's texts that may be empty
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Examples(Protocol):
  """`{"input": ..., "label": int}` by number: a sequence, but for slices of it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Taken:
  """Some examples of a sequence, in the order of `indices`."""

  def __init__(self, examples: Examples, indices: np.ndarray):
    self._examples, self._indices = examples, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[int(self._indices[index])]

  def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
    """Examples as indexing gives them one by one, but several times faster."""
    return read_many(self._examples, self._indices[np.asarray(indices)])


def split_in_two(examples: Examples, every: int) -> tuple[Examples, Examples]:
  """All examples but each `every`-th, and those: of ordered classes as well a share."""
  held_out = np.arange(len(examples)) % every == every - 1
  first, second = np.flatnonzero(~held_out), np.flatnonzero(held_out)
  return Taken(examples, first), Taken(examples, second)


def _label(example: dict[str, Any], key: str, classes: int, place: str) -> int:
  label = int(example[key])
  if label == -1:
    raise ValueError(f"{place}: no label (-1). Pass a split that is labelled")
  if not 0 <= label < classes:
    raise ValueError(
      f"{place}: label {label} under {key!r}, expected 0 to {classes - 1}"
    )
  return label


class Texts:
  """Texts and their labels, all in memory.

  Attributes:
    texts: strings.
    labels: int32 [examples].
  """

  def __init__(
    self,
    source: Any,
    input_key: str,
    label_key: str,
    classes: int,
    where: str,
    other_texts: Sequence[str] = (),
    escaped: bool = False,
  ):
    """Reads all of `source`.

    A large set may have a few empty texts: they are told of and stay, for a test that
    leaves examples out is another test. `escaped` says that line ends and quotes are
    written with a backslash.

    Raises:
      ValueError: if more than a hundredth of the texts are empty, or a label is missing
        or out of range.
    """
    self.texts: list[str] = []
    labels = []
    for start in range(0, len(source), _CHUNK):
      numbers = range(start, min(start + _CHUNK, len(source)))
      for i, example in zip(numbers, source.__getitems__(numbers), strict=True):
        text = example[input_key].decode("utf-8", errors="replace")
        if escaped:
          text = text.replace("\\n", "\n").replace('\\"', '"')
        self.texts.append(text)
        labels.append(_label(example, label_key, classes, f"{where}, example {i}"))
    self.labels = np.array(labels, np.int32)
    empty = [i for i, text in enumerate(self.texts) if not text.strip()]
    if 0 < len(empty) <= _EMPTY * len(self.texts):
      print(f"{where}: {len(empty):,} of {len(self.texts):,} texts are empty, and stay")
    elif empty:
      others = " or ".join(map(repr, other_texts))
      raise ValueError(
        f"{where}: input_key={input_key!r} is empty in {len(empty):,} of "
        f"{len(self.texts):,} examples, first in example {empty[0]}. Pass another "
        f"input_key{f' ({others})' if others else ''}, or a split that leaves them out,"
        " like 'train[:5]+train[6:]'"
      )

  def __len__(self) -> int:
    return len(self.texts)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"input": self.texts[index], "label": int(self.labels[index])}


class Images:
  """Images and their labels, decoded when they are asked for."""

  def __init__(
    self,
    source: Any,
    input_key: str,
    label_key: str,
    classes: int,
    where: str,
    channels: int,
  ):
    """Reads one example of `source`, whose images are encoded, to check its form.

    Raises:
      ValueError: if that image cannot be decoded, or its label is missing.
    """
    if channels not in _MODES:
      raise ValueError(f"{where}: {channels} channels, expected 1, 3 or 4")
    self._source = source
    self._keys = input_key, label_key
    self._classes = classes
    self._where = where
    self._mode = _MODES[channels]
    self[0]

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = range(len(self))[index]
    return self._decode(number, self._source[number])

  def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
    """Examples as indexing gives them one by one, but several times faster."""
    for start in range(0, len(indices), _CHUNK):
      numbers = [int(i) for i in indices[start : start + _CHUNK]]
      records = self._source.__getitems__(numbers)
      for number, record in zip(numbers, records, strict=True):
        yield self._decode(number, record)

  def _decode(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
    input_key, label_key = self._keys
    place = f"{self._where}, example {number}"
    try:
      with Image.open(io.BytesIO(record[input_key])) as image:
        pixels = np.asarray(_eight_bits(image).convert(self._mode), np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
      unknown = isinstance(error, UnidentifiedImageError)
      reason = "of no known format" if unknown else error
      raise ValueError(f"{place}: the image cannot be decoded ({reason})") from error
    if pixels.ndim == 2:
      pixels = pixels[..., None]
    label = _label(record, label_key, self._classes, place)
    return {"input": pixels, "label": label}


def _eight_bits(image: Image.Image) -> Image.Image:
  """An image whose 16 bits a pixel are scaled down, as `convert` would clip them."""
  if not image.mode.startswith("I"):
    return image
  return Image.fromarray((np.asarray(image) / 65535 * 255).round().astype(np.uint8))


def read_many(
  examples: Examples, indices: Sequence[int] | np.ndarray
) -> Iterator[dict[str, Any]]:
  """Examples in the order of `indices`, in the fastest way that they have."""
  if hasattr(examples, "read"):
    return examples.read(indices)
  return (examples[int(i)] for i in indices)


def evenly(examples: Sized, limit: int | None) -> np.ndarray:
  """Indices of `limit` examples at most, drawn evenly from all."""
  count = len(examples)
  kept = min(limit or count, count)
  return np.arange(kept) * count // kept
