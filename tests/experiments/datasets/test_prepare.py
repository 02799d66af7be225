"""Data sets as arrays."""

import numpy as np
import pytest
from helpers import tfds_sets
from helpers.tfds_sets import (
  SHARED,
  assert_same,
  image_features,
  png,
  review_task,
  take,
  text_features,
  texts,
)

from experiments.datasets.loaders import loader
from experiments.datasets.prepare import prepare
from experiments.datasets.tasks import load_task


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
  np.testing.assert_array_equal(
    np.concatenate([batch["label"] for batch in batches]), [0, 1, 0, 1]
  )


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
