"""Random changes of images."""

import numpy as np

from experiments.datasets.augment import augment, random_crop, standardise


def test_crops_are_windows_of_the_reflected_image():
  images = np.random.default_rng(0).random((40, 16, 24, 2), np.float32)
  kept = images.copy()
  found = random_crop(images, np.random.default_rng(1))
  padded = np.pad(images, ((0, 0), (2, 2), (3, 3), (0, 0)), "reflect")
  moves = []
  for image, cropped in zip(padded, found, strict=True):
    hits = [
      (down, right)
      for down, right in np.ndindex(5, 7)
      if (image[down : down + 16, right : right + 24] == cropped).all()
    ]
    assert len(hits) == 1
    moves += hits
  down, right = zip(*moves, strict=True)
  assert (set(down), set(right)) == (set(range(5)), set(range(7)))
  np.testing.assert_array_equal(images, kept)


def test_flips_are_an_option():
  images = np.random.default_rng(0).random((64, 4, 4, 1), np.float32)  # no crop at 4
  batch = {"image": images, "label": np.arange(64)}
  kept = images.copy()
  mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)

  def change(flip):
    transform = augment(mean, std, flip=flip)
    return transform(batch, np.random.default_rng(0))

  found = change(flip=True)
  mirrored = (found["image"] == images[:, :, ::-1]).all((1, 2, 3))
  same = (found["image"] == images).all((1, 2, 3))
  assert (mirrored ^ same).all()
  assert 16 < mirrored.sum() < 48
  np.testing.assert_array_equal(found["label"], batch["label"])
  np.testing.assert_array_equal(change(flip=False)["image"], images)
  np.testing.assert_array_equal(images, kept)


def test_standardising_leaves_the_rest():
  batch = {"image": np.ones((1, 2, 2, 1), np.float32), "label": np.zeros(1)}
  transform = standardise(np.float32([0.5]), np.float32([0.25]))
  found = transform(batch, np.random.default_rng(0))
  np.testing.assert_array_equal(found["image"], np.full((1, 2, 2, 1), 2.0))
  assert found["label"] is batch["label"]
