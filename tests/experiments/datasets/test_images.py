"""Images of a data set in one shape."""

import pathlib

import numpy as np
import pytest
from helpers.tfds_sets import assert_same, take

from experiments.datasets import images
from experiments.datasets.loaders import loader
from experiments.datasets.prepare import prepare
from experiments.datasets.tasks import Task


def picture_rows(count, sizes=((8, 12),)):
  rng = np.random.default_rng(0)
  pixels = [
    rng.integers(256, size=(*sizes[i % len(sizes)], 3), dtype=np.uint8)
    for i in range(count)
  ]
  return [{"input": image, "label": i % 3} for i, image in enumerate(pixels)]


def picture_task(train, test):
  return Task("pictures", "image", train, test, 3, ("a", "b", "c"), True)


def prepared_pictures(train, test, **options):
  cache = pathlib.Path("unused")  # there is no tokenizer to keep
  task = picture_task(train, test)
  return prepare(task, length=1, vocabulary=64, cache=cache, **options)


def test_images_are_decoded_at_once():
  train, test = picture_rows(7), picture_rows(4)
  found = prepared_pictures(train, test)
  assert found.image_shape == (8, 12, 3)
  for rows, arrays in ((train, found.train), (test, found.test)):
    np.testing.assert_array_equal(arrays["image"], [row["input"] for row in rows])
    np.testing.assert_array_equal(arrays["label"], [row["label"] for row in rows])
    assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)
  pixels = np.stack([row["input"] for row in train]).reshape(-1, 3) / 255.0
  np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found.std, pixels.std(0), rtol=1e-6)
  (batch,) = loader(found.train, 7, seed=0, shuffle=False, epochs=1)
  assert batch["image"].dtype == np.float32
  expected = found.train["image"].astype(np.float64) / 255.0
  np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)


def test_images_that_do_not_fit_are_decoded_in_batches(monkeypatch):
  train, test = picture_rows(7, ((16, 20), (20, 16))), picture_rows(4)
  whole = prepared_pictures(train, test, image_size=8, limit_train=5)
  monkeypatch.setattr(images, "IMAGE_BYTES", 4 * 8 * 8 * 3)  # the test split still fits
  streamed = prepared_pictures(train, test, image_size=8, limit_train=5)
  assert not isinstance(streamed.train, dict)
  assert isinstance(streamed.test, dict)
  assert len(streamed.train) == 5
  np.testing.assert_array_equal(streamed.train[4]["input"], whole.train["image"][4])
  np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-6)
  np.testing.assert_allclose(streamed.std, whole.std, rtol=1e-6)
  options = {"seed": 3, "transform": whole.train_transform}
  found, expected = (take(loader(p.train, 3, **options), 6) for p in (streamed, whole))
  assert_same(found, expected)


def test_images_of_several_sizes_need_one():
  rows = picture_rows(6, ((16, 20), (20, 16)))
  message = r"training split: images differ in size, \(16, 20, 3\) and \(20, 16, 3\)"
  with pytest.raises(ValueError, match=message):
    prepared_pictures(rows, rows)
  found = prepared_pictures(rows, rows, image_size=8)
  assert found.train["image"].shape == (6, 8, 8, 3)
  message = "test split: images differ in size.*pass image_size"
  with pytest.raises(ValueError, match=message):
    prepared_pictures(rows[::2], rows)


def test_scaling_cuts_to_the_middle():
  image = np.zeros((16, 32, 1), np.uint8)
  image[:, 6:26] = 200  # the filter reaches over the edges
  np.testing.assert_array_equal(images.fit(image, 8), np.full((8, 8, 1), 200))
  assert images.fit(image[:, :16], 16).base is image  # nothing to do


def test_channel_of_one_value():
  rows = [{"input": np.full((8, 8, 1), 51, np.uint8), "label": i} for i in range(3)]
  found = prepared_pictures(rows, rows)
  np.testing.assert_allclose(found.mean, [0.2], rtol=1e-6)
  (batch,) = loader(found.test, 3, seed=0, epochs=1, transform=found.test_transform)
  np.testing.assert_allclose(batch["image"], 0.0, atol=1e-6)


def test_standardised_training_images():
  rows = picture_rows(9)
  found = prepared_pictures(rows, rows)
  options = {"seed": 0, "epochs": 1, "transform": found.test_transform}
  (batch,) = loader(found.train, 9, **options)
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"].mean((0, 1, 2)), 0.0, atol=1e-5)
  np.testing.assert_allclose(batch["image"].std((0, 1, 2)), 1.0, atol=1e-5)
  train = take(loader(found.train, 9, seed=0, transform=found.train_transform), 1)
  assert train[0]["image"].dtype == np.float32
  assert train[0]["image"].shape == (9, 8, 12, 3)
