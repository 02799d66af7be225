"""Batches: what is in them, and going on from a state."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from helpers import tfds_sets
from helpers.tfds_sets import SHARED, image_features, png, text_features, texts

from experiments.datasets import images
from experiments.datasets.augment import augment, random_crop, standardise
from experiments.datasets.loaders import loader
from experiments.datasets.prepare import prepare
from experiments.datasets.tasks import Task, load_task
from experiments.downstream.baseline import linear_baseline

COUNT = 10


@pytest.fixture
def arrays():
  ids = np.arange(COUNT * 3, dtype=np.int32).reshape(COUNT, 3)
  return {"ids": ids, "valid": ids % 3 < 2, "label": np.arange(COUNT, dtype=np.int32)}


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


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


def review_task():
  """Texts whose words tell the class."""
  rng = np.random.default_rng(0)
  words = (("bad", "dull", "boring"), ("good", "fine", "great"))
  rows = []
  for label in rng.integers(2, size=60):
    chosen = rng.choice(words[label], size=rng.integers(3, 9))
    rows.append({"input": "the film was " + " ".join(chosen), "label": int(label)})
  return Task("reviews", "text", rows[:40], rows[40:], 2, ("neg", "pos"))


def test_texts_are_encoded_at_once(tmp_path):
  task = review_task()
  found = prepare(task, length=6, vocabulary=64, cache=tmp_path)
  assert (found.kind, found.classes, found.length) == ("text", 2, 6)
  assert found.train["ids"].max() < found.vocabulary_size <= 64
  assert found.train["ids"].shape == found.train["valid"].shape == (40, 6)
  assert found.test["label"].tolist() == [row["label"] for row in task.test]
  assert found.train_transform is None
  assert found.test_transform is None
  (batch,) = take(loader(found.train, 16, seed=0), 1)
  assert {name: b.shape[0] for name, b in batch.items()} == dict.fromkeys(batch, 16)
  end = prepare(task, length=6, vocabulary=64, cache=tmp_path, keep="end")
  assert (end.train["ids"] != found.train["ids"]).any()


def test_vocabulary_is_learned_from_the_training_texts_alone(tmp_path):
  task = review_task()
  other = task._replace(test=[{"input": "zzz qqq", "label": 0}] * 4)
  for one in (task, other):
    found = prepare(one, length=6, vocabulary=64, cache=tmp_path)
  assert len(list(tmp_path.iterdir())) == 1
  assert (found.test["ids"][:, :2] == 1).any()


def test_limits_draw_from_the_whole_split(tmp_path):
  options = {"length": 6, "vocabulary": 64, "cache": tmp_path}
  whole = prepare(review_task(), **options)
  part = prepare(review_task(), **options, limit_train=10, limit_test=100)
  np.testing.assert_array_equal(part.train["label"], whole.train["label"][::4])
  np.testing.assert_array_equal(part.test["label"], whole.test["label"])


def test_linear_baseline_of_texts():
  assert linear_baseline(review_task()) == 1.0
  shuffled = review_task()
  wrong = [row | {"label": 1 - row["label"]} for row in shuffled.test]
  assert linear_baseline(shuffled._replace(test=wrong)) == 0.0


def test_linear_baseline_of_images():
  rows = []
  for i in range(40):
    pixels = np.full((20, 24, 3), 40, np.uint8)
    pixels[:, 12 * (i % 2) : 12 * (i % 2) + 12] = 200
    rows.append({"input": pixels, "label": i % 2})
  task = Task("sides", "image", rows, rows[:30], 2, ("left", "right"))
  assert linear_baseline(task) == 1.0


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


@pytest.mark.parametrize("name", ["limit_train", "limit_test", "image_size"])
def test_errors_of_preparing(tmp_path, name):
  options = {"length": 6, "vocabulary": 64, "cache": tmp_path, name: 0}
  with pytest.raises(ValueError, match=f"{name}=0: expected at least 1, or None"):
    prepare(review_task(), **options)


def test_damaged_image_of_a_set_is_named(tmp_path):
  good = {"image": png(np.zeros((8, 8, 3), np.uint8)), "label": 1}
  splits = {"train": [good, good | {"image": b"none"}], "test": [good]}
  tfds_sets.write(tmp_path, "cifar10", image_features(), splits)
  task = load_task("cifar10", data_dir=tmp_path)
  with pytest.raises(ValueError, match="example 1: the image cannot be decoded"):
    prepare(task, length=1, vocabulary=64, cache=tmp_path)


def test_set_on_disk_to_batches(tmp_path):
  rows = texts([(f"good film {i}", i % 2) for i in range(6)], "description")
  splits = {"train": rows, "test": rows[:4]}
  features = text_features(key="description")
  tfds_sets.write(tmp_path, "ag_news_subset", features, splits)
  task = load_task("ag_news_subset", data_dir=tmp_path)
  found = prepare(task, length=4, vocabulary=64, cache=tmp_path / "cache")
  batches = list(loader(found.test, 3, seed=0, shuffle=False, epochs=1))
  np.testing.assert_array_equal(labels_of(batches), [0, 1, 0, 1])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize("name", ["ag_news_subset", "cifar10"])
def test_real_sets(tmp_path, name):
  task = load_task(name, data_dir=SHARED)
  limits = {"limit_train": 256, "limit_test": 64}
  found = prepare(task, length=32, vocabulary=512, cache=tmp_path, **limits)
  assert len(found.train["label"]) == 256
  assert np.bincount(found.train["label"]).min() > 8
  options = {"seed": 0, "transform": found.train_transform}
  iterator = loader(found.train, 16, **options)
  take(iterator, 20)
  resumed = loader(found.train, 16, **options)
  resumed.set_state(iterator.get_state())
  assert_same(take(resumed, 4), take(iterator, 4))
  if found.kind == "text":
    ids, valid = found.train["ids"], found.train["valid"]
    assert valid[:, 0].all()
    assert (ids[valid] == 1).mean() < 0.01
    assert (ids[~valid] == 0).all()
  else:
    np.testing.assert_allclose(found.mean, [0.49, 0.48, 0.45], atol=0.03)
    np.testing.assert_allclose(found.std, [0.25, 0.24, 0.26], atol=0.03)
