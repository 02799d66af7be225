"""Random changes of image batches that keep their labels."""

import numpy as np

from experiments.datasets.loaders import Batch, Transform


def standardise(mean: np.ndarray, std: np.ndarray) -> Transform:
  """For evaluation: (image - mean) / std, both [channels] and of images in [0, 1]."""

  def transform(batch: Batch, rng: np.random.Generator) -> Batch:
    del rng
    return batch | {"image": (batch["image"] - mean) / std}

  return transform


def augment(mean: np.ndarray, std: np.ndarray, *, flip: bool) -> Transform:
  """For training: a random crop, a random flip, and then `standardise`.

  Images are padded by reflection, by an eighth of their height and width on each side
  (4 pixels of 32), and cropped to their size; `flip` mirrors half of them. Every image
  of a batch is changed on its own.
  """
  standardised = standardise(mean, std)

  def transform(batch: Batch, rng: np.random.Generator) -> Batch:
    image = random_crop(batch["image"], rng)
    if flip:
      mirrored = rng.random(len(image)) < 0.5
      image[mirrored] = image[mirrored, :, ::-1]
    return standardised(batch | {"image": image}, rng)

  return transform


def random_crop(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Copies of images [batch, height, width, channels], moved at random."""
  count, height, width, _ = images.shape
  margins = height // 8, width // 8
  pads = [(0, 0), *((margin, margin) for margin in margins), (0, 0)]
  padded = np.pad(images, pads, mode="reflect")
  down, right = (rng.integers(2 * margin + 1, size=count) for margin in margins)
  windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (1, 2))
  return np.moveaxis(windows[np.arange(count), down, right], 1, -1)
