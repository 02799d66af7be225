"""Images of a data set in one shape, in memory where they fit."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from experiments.datasets.examples import Examples, evenly, read_many

IMAGE_BYTES = 2**31  # a split with more is decoded batch by batch
_SAMPLE = 1024  # images whose statistics stand for those of a split with more bytes


def fit(image: np.ndarray, size: int | None) -> np.ndarray:
  """A uint8 image [height, width, channels], scaled to a square of side `size`.

  Of an image that is none, what is outside the square in its middle is cut off.
  """
  if size is None or image.shape[:2] == (size, size):
    return image
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  scaled = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
  return np.asarray(scaled).reshape(size, size, image.shape[-1])


class _Scaled:
  """Some examples of images, all of one shape."""

  def __init__(
    self,
    examples: Examples,
    indices: np.ndarray,
    size: int | None,
    shape: tuple[int, int, int],
    where: str,
  ):
    self._examples, self._indices = examples, indices
    self._size, self._shape, self._where = size, shape, where

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return next(self.read([range(len(self))[index]]))

  def read(self, indices: Sequence[int] | np.ndarray) -> Iterator[dict[str, Any]]:
    for row in read_many(self._examples, self._indices[indices]):
      image = fit(row["input"], self._size)
      if image.shape != self._shape:
        raise ValueError(
          f"{self._where}: images differ in size, {self._shape} and {image.shape}: "
          "pass image_size"
        )
      yield {"input": image, "label": row["label"]}


def decode(
  examples: Examples,
  indices: np.ndarray,
  size: int | None,
  shape: tuple[int, int, int],
  where: str,
) -> dict[str, np.ndarray] | Examples:
  """Some examples as `image` uint8 [examples, *shape] and `label` int32 [examples].

  If these take more than `IMAGE_BYTES`, a sequence that decodes when it is indexed.

  Raises:
    ValueError: if an image, scaled to `size` if there is one, is not of `shape`.
  """
  scaled = _Scaled(examples, indices, size, shape, where)
  if len(indices) * int(np.prod(shape)) > IMAGE_BYTES:
    return scaled
  images = np.empty((len(indices), *shape), np.uint8)
  labels = np.empty(len(indices), np.int32)
  for i, row in enumerate(scaled.read(np.arange(len(indices)))):
    images[i], labels[i] = row["input"], row["label"]
  arrays: dict[str, np.ndarray] = {"image": images, "label": labels}
  return arrays


def statistics(
  train: Mapping[str, np.ndarray] | Examples,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean and deviation of channels, float32 [channels], of images in [0, 1]."""
  if isinstance(train, Mapping):
    images = train["image"]
  else:
    rows = read_many(train, evenly(train, _SAMPLE))
    images = np.stack([row["input"] for row in rows])
  channels = images.shape[-1]
  count = images.size // channels
  total, squares = np.zeros((2, channels))
  for start in range(0, len(images), 256):  # few at a time, as they grow eightfold
    pixels = images[start : start + 256].reshape(-1, channels) / 255.0
    total += pixels.sum(0)
    squares += np.square(pixels).sum(0)
  mean = total / count
  variance = np.maximum(squares / count - mean**2, 0)
  std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
  return mean.astype(np.float32), std.astype(np.float32)
