"""Classification data sets by their names in TensorFlow Datasets (TFDS).

Read as `array_record` through `tfds` data sources, which needs no TensorFlow.
"""

import pathlib
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.examples import Examples, Images, Texts, split_in_two
from experiments.datasets.tfds import check_splits, find_builder, open_split, parts_of


class Preset(NamedTuple):
  """Features and splits of a data set to read.

  `flip` says that a mirrored image keeps its label; `repository` is the one of Hugging
  Face from which TFDS prepares what is not in its own catalogue; `classes` are those of
  labels that are no more than integers; `escaped` says that line ends and quotes in
  texts are written with a backslash.
  """

  input_key: str
  label_key: str = "label"
  train_split: str = "train"
  test_split: str = "test"
  config: str | None = None
  flip: bool = False
  repository: str | None = None
  classes: int = 0
  escaped: bool = False


PRESETS = {
  "ag_news_subset": Preset("description", classes=4),
  "imdb_reviews": Preset("text", config="plain_text", classes=2),
  "dbpedia_14": Preset(
    "content", config="dbpedia_14", repository="fancyzhx/dbpedia_14", classes=14
  ),
  "yelp_review_full": Preset(
    "text",
    config="yelp_review_full",
    repository="Yelp/yelp_review_full",
    classes=5,
    escaped=True,
  ),
  "yelp_polarity_reviews": Preset("text", classes=2, escaped=True),
  "cats_vs_dogs": Preset("image", flip=True, classes=2),
  "cifar10": Preset("image", flip=True, classes=10),
  "cifar100": Preset("image", flip=True, classes=100),
  "mnist": Preset("image", classes=10),
}
# What Hugging Face calls these features, of the same data.
_ALIASES = {
  "description": ("text",),
  "image": ("img",),
  "label": ("labels", "fine_label"),
}
# Of a data set without a test split, every fifth example is held out to test with.
HELD_OUT = 5


class Task(NamedTuple):
  """A data set for classification.

  `train` and `test` are sequences of `{"input": ..., "label": int}`, where an input is
  a string or a uint8 image [height, width, channels]. `flip` says that a mirrored image
  keeps its label, `sizes_differ` that those of images may.
  """

  name: str
  kind: Literal["text", "image"]
  train: Examples
  test: Examples
  classes: int
  label_names: tuple[str, ...]
  flip: bool = False
  sizes_differ: bool = False


def load_task(
  name: str,
  *,
  data_dir: str | pathlib.Path | None = None,
  input_key: str | None = None,
  label_key: str | None = None,
  train_split: str | None = None,
  test_split: str | None = None,
) -> Task:
  """A data set by its name in TFDS, such as "mnist" or "imdb_reviews/plain_text".

  Texts are read at once, images when they are asked for. What is not prepared in
  `data_dir` (by default the one of TFDS) is downloaded into it.

  Args:
    name: of `PRESETS`, or any other data set of TFDS, with a configuration and a
      version if need be.
    data_dir: the directory that holds the data set's own.
    input_key: the feature that is classified, a text or an image; by default the
      preset's, or else what the data set names as its supervised input.
    label_key: the feature that holds the class; as `input_key`.
    train_split: by default the preset's, or else "train"; parts like "train[:80%]".
    test_split: by default "test", or "validation" where there is none; where there is
      neither, every `HELD_OUT`-th example of the training split is tested with, and
      not trained on.

  Raises:
    ValueError: if there is no such data set, feature or split, if they do not make a
      classification task, if the splits overlap, or if a text is empty or a label
      missing. It says what to pass instead.
    RuntimeError: if the data set is not prepared and cannot be downloaded.
  """
  parts = parts_of(name)
  preset = preset_named(parts.base)
  builder = find_builder(parts, data_dir, preset, tuple(PRESETS))
  features = builder.info.features
  if preset is None:
    preset = Preset(*_supervised(name, builder.info, input_key, label_key))
  else:
    preset = preset._replace(
      input_key=_present(preset.input_key, features),
      label_key=_present(preset.label_key, features),
    )
  input_key = preset.input_key if input_key is None else input_key
  label_key = preset.label_key if label_key is None else label_key
  kind = _kind(name, features, input_key)
  classes, names = _classes(name, features, label_key, preset)
  train_split = preset.train_split if train_split is None else train_split
  if test_split is None:
    there = (preset.test_split, "validation")
    test_split = next((split for split in there if split in builder.info.splits), None)
  splits = {"train": train_split, "test": test_split}
  check_splits(name, builder.info, {k: s for k, s in splits.items() if s is not None})

  def read(split: str) -> Examples:
    source = open_split(name, builder, split)
    where = f"{name}, split {split!r}"
    keys = input_key, label_key
    if kind == "image":
      return Images(source, *keys, classes, where, features[input_key].shape[-1])
    others = [key for key, f in features.items() if _is_text(f) and key != input_key]
    return Texts(source, *keys, classes, where, others, preset.escaped)

  train = read(train_split)
  if test_split is None:
    print(f"{name} has no test split: one of {HELD_OUT} of {train_split!r} is held out")
    train, test = split_in_two(train, HELD_OUT)
  else:
    test = read(test_split)
  sizes_differ = kind == "image" and None in features[input_key].shape[:2]
  return Task(name, kind, train, test, classes, names, preset.flip, sizes_differ)


def preset_named(base: str) -> Preset | None:
  """The preset of a data set's name, without or with who has it at Hugging Face."""
  return PRESETS.get(base.rpartition("__")[2])


def _present(key: str, features: tfds.features.FeaturesDict) -> str:
  """The key, or what Hugging Face calls it where there is no such feature."""
  if key in features:
    return key
  return next((other for other in _ALIASES.get(key, ()) if other in features), key)


def _classes(
  name: str, features: tfds.features.FeaturesDict, key: str, preset: Preset
) -> tuple[int, tuple[str, ...]]:
  """Number and names of the classes of a label."""
  label = _feature(name, features, "label_key", key)
  if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
    return label.num_classes, tuple(label.names)
  if preset.classes and key == preset.label_key and _is_integer(label):
    return preset.classes, tuple(map(str, range(preset.classes)))
  raise ValueError(
    f"label_key={key!r}: expected a class of {name}, got {_describe(label)}. "
    f"{_list(features)}"
  )


def _is_integer(feature: tfds.features.FeatureConnector) -> bool:
  # A class without a number of classes is one, too.
  if not isinstance(feature, tfds.features.Tensor) or feature.shape:
    return False
  return np.issubdtype(np.dtype(feature.np_dtype), np.integer)


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
  """Whether it is one string; those of Hugging Face are not called texts."""
  if not isinstance(feature, tfds.features.Tensor) or feature.shape:
    return False
  return np.dtype(feature.np_dtype) == np.object_


def _describe(feature: tfds.features.FeatureConnector) -> str:
  kind = type(feature).__name__
  if isinstance(feature, tfds.features.ClassLabel):
    return f"{kind} of {feature.num_classes}"
  if kind in ("Scalar", "Tensor"):
    dtype = np.dtype(feature.np_dtype)
    return f"{kind} of {'string' if dtype == np.object_ else dtype.name}"
  return kind


def _list(features: tfds.features.FeaturesDict) -> str:
  listed = ", ".join(f"{key!r} ({_describe(f)})" for key, f in features.items())
  return f"Its features are {listed}"


def _feature(
  name: str, features: tfds.features.FeaturesDict, argument: str, key: str
) -> tfds.features.FeatureConnector:
  if key not in features:
    raise ValueError(f"{argument}={key!r}: not a feature of {name}. {_list(features)}")
  return features[key]


def _kind(
  name: str, features: tfds.features.FeaturesDict, key: str
) -> Literal["text", "image"]:
  feature = _feature(name, features, "input_key", key)
  if _is_text(feature):
    return "text"
  if isinstance(feature, tfds.features.Image) and feature.np_dtype == np.uint8:
    return "image"
  raise ValueError(
    f"input_key={key!r}: expected a text or a uint8 image of {name}, got "
    f"{_describe(feature)}. {_list(features)}"
  )


def _supervised(
  name: str, info: Any, input_key: str | None, label_key: str | None
) -> tuple[str, str]:
  """Keys given, completed by those that the data set itself calls supervised."""
  own = info.supervised_keys
  if not (isinstance(own, tuple) and all(isinstance(key, str) for key in own[:2])):
    own = None, None
  keys = input_key or own[0], label_key or own[1]
  for argument, key in zip(("input_key", "label_key"), keys, strict=True):
    if key is None:
      raise ValueError(f"{name} has no preset: pass {argument}. {_list(info.features)}")
  return keys
