"""Data sets by name, and errors that say what to pass."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import tfds_sets
from helpers.tfds_sets import SHARED, image_features, png, text_features, texts
from PIL import Image

from experiments.datasets.examples import evenly, read_many
from experiments.datasets.tasks import PRESETS, load_task

PAIRS = [("good film", 1), ("bad film", 0), ("a good one", 1), ("bad", 0)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """Texts under a name that TFDS does not know."""
  features = text_features() | {
    "stars": tfds.features.Scalar(np.int32),
    "title": tfds.features.Text(),
  }
  rows = [row | {"stars": 3, "title": ""} for row in texts(PAIRS)]
  unlabelled = [row | {"label": -1} for row in rows]
  splits = {"train": rows, "test": rows[:3], "unlabelled": unlabelled}
  return tfds_sets.write(tmp_path_factory.mktemp("tfds"), "films", features, splits)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  """Images of different sizes, the last of `train` damaged."""
  rng = np.random.default_rng(0)
  rows = [
    {"image": png(rng.integers(256, size=(8 + i, 12, 3), dtype=np.uint8)), "label": i}
    for i in range(2)
  ]
  damaged = {"image": b"\x89PNG none", "label": 1}
  splits = {"train": [*rows, damaged], "test": rows}
  folder = tmp_path_factory.mktemp("tfds")
  return tfds_sets.write(folder, "shapes", image_features(), splits)


def load_films(folder, **options):
  keys = {"input_key": "text", "label_key": "label"}
  return load_task("films", data_dir=folder, **(keys | options))


def test_texts_come_in_their_order(films):
  task = load_films(films)
  assert (task.name, task.kind, task.classes) == ("films", "text", 2)
  assert task.label_names == ("0", "1")
  assert [(row["input"], row["label"]) for row in task.train] == PAIRS
  assert len(task.test) == 3
  assert task.train.labels.dtype == np.int32


def test_parts_of_splits(films):
  task = load_films(films, train_split="train[:50%]", test_split="train[50%:]")
  assert [row["input"] for row in task.train] == ["good film", "bad film"]
  assert [row["input"] for row in task.test] == ["a good one", "bad"]
  task = load_films(films, train_split="train[:1]+train[2:]")
  assert [row["input"] for row in task.train] == ["good film", "a good one", "bad"]


def test_images_keep_their_sizes(shapes):
  task = load_task("shapes", data_dir=shapes, input_key="image", label_key="label")
  assert (task.kind, task.flip) == ("image", False)
  found = [(row["input"].shape, row["label"]) for row in task.test]
  assert found == [((8, 12, 3), 0), ((9, 12, 3), 1)]
  for one, other in zip(task.test, task.test.read([0, 1]), strict=True):
    np.testing.assert_array_equal(one["input"], other["input"])
  with pytest.raises(IndexError):
    task.test[2]
  np.testing.assert_array_equal(task.test[-1]["input"], task.test[1]["input"])


def test_damaged_image_is_named_when_it_is_read(shapes):
  task = load_task("shapes", data_dir=shapes, input_key="image", label_key="label")
  message = "shapes, split 'train', example 2: the image cannot be decoded"
  with pytest.raises(ValueError, match=message):
    task.train[2]
  with pytest.raises(ValueError, match=message):
    list(task.train.read([0, 2]))


def test_images_without_a_channel_of_colour(tmp_path):
  pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
  rows = [{"image": png(pixels), "label": 3}]
  features = image_features((8, 8, 1), 10)
  tfds_sets.write(tmp_path, "mnist", features, {"train": rows, "test": rows})
  (row,) = load_task("mnist", data_dir=tmp_path).train
  np.testing.assert_array_equal(row["input"], pixels)
  assert row["label"] == 3


def test_images_of_sixteen_bits_are_scaled(tmp_path):
  pixels = np.array([[0, 1000], [32768, 65535]], np.uint16)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  rows = [{"image": file.getvalue(), "label": 3}]
  features = image_features((2, 2, 1), 10)
  tfds_sets.write(tmp_path, "mnist", features, {"train": rows, "test": rows})
  (row,) = load_task("mnist", data_dir=tmp_path).train
  np.testing.assert_array_equal(row["input"][..., 0], [[0, 4], [128, 255]])


def test_keys_are_those_that_the_set_calls_supervised(tmp_path):
  splits = {"train": texts(PAIRS), "test": texts(PAIRS)}
  tfds_sets.write(tmp_path, "films", text_features(), splits, ("text", "label"))
  assert len(load_task("films", data_dir=tmp_path).train) == 4


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"input_key": "txt"}, r"input_key='txt': not a feature of films.*'text' \(Text\)"),
    ({"label_key": "class"}, r"label_key='class': not a.*'label' \(ClassLabel of 2\)"),
    (
      {"label_key": "stars"},
      r"expected a class of films, got Scalar of int32",
    ),
    ({"input_key": "stars"}, r"expected a text or a uint8 image.*got Scalar.*'text'"),
    (
      {"test_split": "validation"},
      r"test_split='validation': no such split.*train \(4\), test \(3\), unlabelled",
    ),
    ({"train_split": "train[:50"}, r"train_split='train\[:50': no such split"),
    ({"train_split": ""}, "train_split='': no such split"),
    ({"train_split": "train[:0]"}, "holds no example of films"),
    ({"train_split": "train[3:1]"}, "holds no example of films"),
    ({"test_split": "train[3:]"}, "'train' and test_split='train.3:.' of films share"),
    ({"test_split": "unlabelled"}, "'unlabelled', example 0: no label .-1.*labelled"),
    (
      {"input_key": "title"},
      "input_key='title' is empty in 4 of 4 examples, first in example 0.*'text'.*"
      "like 'train",
    ),
  ],
)
def test_error_says_what_to_pass(films, options, message):
  with pytest.raises(ValueError, match=message):
    load_films(films, **options)


@pytest.mark.parametrize("missing", ["input_key", "label_key"])
def test_keys_of_an_unknown_set_have_to_be_named(films, missing):
  with pytest.raises(ValueError, match=f"films has no preset: pass {missing}.*'text'"):
    load_films(films, **{missing: None})


def test_one_empty_text_is_named(tmp_path):
  rows = texts([("a", 0), ("b", 1), (" \n", 1)])
  tfds_sets.write(tmp_path, "films", text_features(), {"train": rows, "test": rows})
  message = r"empty in 1 of 3 examples, first in example 2. Pass another input_key, or"
  with pytest.raises(ValueError, match=message):
    load_films(tmp_path, test_split="train[:0]+test[:2]")
  left_out = load_films(tmp_path, train_split="train[:2]", test_split="test[:2]")
  assert len(left_out.train) == len(left_out.test) == 2


def test_label_out_of_range_is_named(tmp_path):
  rows = texts([("a", 0), ("b", 4)])
  splits = {"train": rows, "test": rows}
  tfds_sets.write(tmp_path, "films", text_features(5), splits)
  features = tmp_path / "films" / "1.0.0" / "features.json"
  tfds_sets.edit_json(features, '"numClasses": "5"', '"numClasses": "2"')
  with pytest.raises(ValueError, match="example 1: label 4 under 'label', expected"):
    load_films(tmp_path)


def test_label_of_an_image_is_checked(tmp_path):
  pixels = np.zeros((8, 8, 3), np.uint8)
  splits = {
    split: [{"image": png(pixels), "label": label}]
    for split, label in (("train", 1), ("test", -1))
  }
  tfds_sets.write(tmp_path, "cifar10", image_features(classes=10), splits)
  with pytest.raises(ValueError, match="'test', example 0: no label"):
    load_task("cifar10", data_dir=tmp_path)


def test_images_of_floats_are_refused(tmp_path):
  features = {
    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.float32),
    "label": tfds.features.ClassLabel(num_classes=2),
  }
  # Their encoding is TensorFlow's; no split is read before the features are checked.
  tfds_sets.write(tmp_path, "depths", features, {"train": [], "test": []})
  with pytest.raises(ValueError, match="expected a text or a uint8 image of depths"):
    load_task("depths", data_dir=tmp_path, input_key="image", label_key="label")


def test_strings_of_the_hub_are_texts(tmp_path):
  features = {
    "text": tfds.features.Scalar(np.object_),
    "label": tfds.features.ClassLabel(names=["1 star", "2 star"]),
  }
  splits = {"train": texts(PAIRS), "test": texts(PAIRS)}
  where = "yelp__yelp_review_full/yelp_review_full"
  tfds_sets.write(tmp_path, where, features, splits)
  task = load_task("yelp_review_full", data_dir=tmp_path)
  assert [(row["input"], row["label"]) for row in task.train] == PAIRS
  assert task.label_names == ("1 star", "2 star")


def test_without_a_test_split_every_fifth_example_is_held_out(tmp_path, capsys):
  rows = texts([(f"text {i}", i % 2) for i in range(12)])
  tfds_sets.write(tmp_path, "imdb_reviews/plain_text", text_features(), {"train": rows})
  task = load_task("imdb_reviews", data_dir=tmp_path)
  assert "has no test split: one of 5 of 'train' is held out" in capsys.readouterr().out
  everything = [f"text {i}" for i in range(12)]
  assert [row["input"] for row in task.test] == ["text 4", "text 9"]
  trained_on = [row["input"] for row in task.train]
  assert trained_on == [text for text in everything if text not in ("text 4", "text 9")]
  read = [row["input"] for row in task.train.read(np.array([0, 4]))]
  assert read == ["text 0", "text 5"]


def test_a_validation_split_is_tested_with_where_there_is_no_other(tmp_path):
  splits = {"train": texts(PAIRS), "validation": texts(PAIRS[:2])}
  tfds_sets.write(tmp_path, "imdb_reviews/plain_text", text_features(), splits)
  task = load_task("imdb_reviews", data_dir=tmp_path)
  assert (len(task.train), len(task.test)) == (4, 2)


def test_a_preset_takes_labels_that_are_integers(tmp_path):
  features = text_features() | {"label": tfds.features.Scalar(np.int64)}
  splits = {"train": texts(PAIRS), "test": texts([("fine", 4)])}
  tfds_sets.write(tmp_path, "yelp_review_full", features, splits)
  task = load_task("yelp_review_full", data_dir=tmp_path)
  assert (task.classes, task.label_names) == (5, ("0", "1", "2", "3", "4"))
  assert task.test[0]["label"] == 4


@pytest.mark.parametrize(
  ("name", "where", "image", "label"),
  [
    ("cats_vs_dogs", "cats_vs_dogs/default", "image", "labels"),
    ("cifar100", "cifar100", "img", "fine_label"),
  ],
)
def test_features_by_their_names_at_the_hub(tmp_path, name, where, image, label):
  features = {
    image: tfds.features.Image(),
    label: tfds.features.ClassLabel(num_classes=2),
    "coarse_label": tfds.features.ClassLabel(num_classes=2),
  }
  value = png(np.zeros((32, 32, 3), np.uint8))
  rows = [{image: value, label: i % 2, "coarse_label": 0} for i in range(5)]
  tfds_sets.write(tmp_path, where, features, {"train": rows, "test": rows})
  task = load_task(name, data_dir=tmp_path)
  assert [row["label"] for row in task.train] == [0, 1, 0, 1, 0]
  assert task.sizes_differ


def test_few_empty_texts_stay(tmp_path, capsys):
  rows = texts([("a", 0)] * 99 + [(" ", 1)])
  tfds_sets.write(tmp_path, "films", text_features(), {"train": rows, "test": rows[:9]})
  task = load_films(tmp_path)
  assert (len(task.train), task.train[99]["input"]) == (100, " ")
  assert "'train': 1 of 100 texts are empty, and stay" in capsys.readouterr().out


def test_reviews_of_yelp_have_line_ends(tmp_path):
  task = load_task("yelp_review_full", data_dir=tfds_sets.write_yelp(tmp_path))
  assert task.train[0]["input"].endswith('.\n\nI "like" it')
  assert task.label_names[0] == "1 star"


def test_cats_and_dogs_are_of_any_size_and_in_colour(tmp_path):
  task = load_task("cats_vs_dogs", data_dir=tfds_sets.write_cats(tmp_path))
  assert task.sizes_differ
  assert (len(task.train), len(task.test)) == (48, 12)
  rows = [*task.train, *task.test]
  assert len({row["input"].shape[:2] for row in rows}) > 50
  assert {row["input"].shape[2] for row in rows} == {3}
  # Though the classes come one after the other.
  assert {row["label"] for row in task.test} == {0, 1}


def test_labels_of_cifar100_are_fine_or_coarse(tmp_path):
  tfds_sets.write_cifar100(tmp_path)
  fine = load_task("cifar100", data_dir=tmp_path)
  coarse = load_task("cifar100", data_dir=tmp_path, label_key="coarse_label")
  assert (fine.classes, coarse.classes) == (100, 20)
  assert [row["label"] // 5 for row in fine.train] == [r["label"] for r in coarse.train]
  assert not fine.sizes_differ


def test_texts_of_dbpedia_are_its_contents(tmp_path):
  task = load_task("dbpedia_14", data_dir=tfds_sets.write_dbpedia(tmp_path))
  assert (task.classes, task.label_names[13]) == (14, "Kind 13")
  assert task.train[3]["input"] == "caf\ufffd in word3"
  titles = load_task("dbpedia_14", data_dir=tmp_path, input_key="title")
  assert titles.train[3]["input"] == "Name 3"


def preset_set(folder, name):
  """A directory of the features and splits that a preset's data set has."""
  preset = PRESETS[name]
  where = f"{name}/{preset.config}" if preset.config else name
  if preset.input_key == "image":
    value = png(np.zeros((8, 8, 1 if name == "mnist" else 3), np.uint8))
    features = image_features((8, 8, 1) if name == "mnist" else (8, 8, 3))
    rows = [{"image": value, "label": i % 2} for i in range(5)]
  else:
    features = text_features(key=preset.input_key)
    rows = texts([(f"text {i}", i % 2) for i in range(5)], preset.input_key)
  splits = {"train": rows}
  if name != "cats_vs_dogs":
    splits["test"] = rows
  if name == "cifar100":
    features["coarse_label"] = tfds.features.ClassLabel(num_classes=2)
    splits = {key: [row | {"coarse_label": 0} for row in rows] for key in splits}
  return tfds_sets.write(folder, where, features, splits)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_need_no_keys(tmp_path, name):
  task = load_task(name, data_dir=preset_set(tmp_path, name))
  assert task.kind == ("image" if PRESETS[name].input_key == "image" else "text")
  labels = [row["label"] for row in task.train]
  if name == "cats_vs_dogs":
    assert (labels, len(task.test)) == ([0, 1, 0, 1], 1)
  else:
    assert (labels, len(task.test)) == ([0, 1, 0, 1, 0], 5)
  assert task.flip == (name in ("cats_vs_dogs", "cifar10", "cifar100"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
@pytest.mark.parametrize(
  ("name", "kind", "sizes", "classes"),
  [
    ("ag_news_subset", "text", (11_808, 7_593), 4),
    ("imdb_reviews", "text", (9_926, 5_000), 2),
    ("imdb_reviews/plain_text:1.0.0", "text", (9_926, 5_000), 2),
    ("cifar10", "image", (30_000, 10_000), 10),
    ("mnist", "image", (20_000, 10_000), 10),
  ],
)
def test_real_sets(name, kind, sizes, classes):
  task = load_task(name, data_dir=SHARED)
  assert (task.kind, task.classes) == (kind, classes)
  assert (len(task.train), len(task.test)) == sizes
  rows = list(read_many(task.train, evenly(task.train, 400)))
  assert {row["label"] for row in rows} == set(range(classes))
  if kind == "image":
    shape = (28, 28, 1) if name == "mnist" else (32, 32, 3)
    assert {row["input"].shape for row in rows} == {shape}
    assert rows[0]["input"].dtype == np.uint8


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data sets are not here")
def test_titles_that_are_not_there():
  with pytest.raises(ValueError, match=r"empty in 11,808 of 11,808.*\('description'\)"):
    load_task("ag_news_subset", data_dir=SHARED, input_key="title")
