"""Classification data sets by their names in TensorFlow Datasets (TFDS).

Read as `array_record` through `tfds` data sources, which needs no TensorFlow.
"""

import pathlib
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.examples import Examples, Images, Texts
from experiments.datasets.tfds import check_splits, find_builder, open_split, parts_of


class Preset(NamedTuple):
  """Features and splits of a data set to read.

  `flip` says that a mirrored image keeps its label; `repository` is the one of Hugging
  Face from which TFDS prepares what is not in its own catalogue.
  """

  input_key: str
  label_key: str = "label"
  train_split: str = "train"
  test_split: str = "test"
  config: str | None = None
  flip: bool = False
  repository: str | None = None


PRESETS = {
  "ag_news_subset": Preset("description"),
  "imdb_reviews": Preset("text", config="plain_text"),
  "dbpedia_14": Preset(
    "content", config="dbpedia_14", repository="fancyzhx/dbpedia_14"
  ),
  "yelp_review_full": Preset(
    "text", config="yelp_review_full", repository="Yelp/yelp_review_full"
  ),
  "yelp_polarity_reviews": Preset("text"),
  "cats_vs_dogs": Preset(
    "image", train_split="train[:80%]", test_split="train[80%:]", flip=True
  ),
  "cifar10": Preset("image", flip=True),
  "cifar100": Preset("image", flip=True),
  "mnist": Preset("image"),
}


class Task(NamedTuple):
  """A data set for classification.

  `train` and `test` are sequences of `{"input": ..., "label": int}`, where an input is
  a string or a uint8 image [height, width, channels]. `flip` says that a mirrored image
  keeps its label.
  """

  name: str
  kind: Literal["text", "image"]
  train: Examples
  test: Examples
  classes: int
  label_names: tuple[str, ...]
  flip: bool = False


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
    test_split: by default the preset's, or else "test".

  Raises:
    ValueError: if there is no such data set, feature or split, if they do not make a
      classification task, if the splits overlap, or if a text is empty or a label
      missing. It says what to pass instead.
    RuntimeError: if the data set is not prepared and cannot be downloaded.
  """
  parts = parts_of(name)
  preset = PRESETS.get(parts.base)
  builder = find_builder(parts, data_dir, preset, tuple(PRESETS))
  preset = preset or Preset(*_supervised(name, builder.info, input_key, label_key))
  features = builder.info.features
  input_key = preset.input_key if input_key is None else input_key
  label_key = preset.label_key if label_key is None else label_key
  kind = _kind(name, features, input_key)
  label = _feature(name, features, "label_key", label_key)
  if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
    raise ValueError(
      f"label_key={label_key!r}: expected a class of {name}, got "
      f"{_describe(label)}. {_list(features)}"
    )
  splits = {
    "train": preset.train_split if train_split is None else train_split,
    "test": preset.test_split if test_split is None else test_split,
  }
  check_splits(name, builder.info, splits)

  def read(role: str) -> Examples:
    source = open_split(name, builder, splits[role])
    where = f"{name}, split {splits[role]!r}"
    keys = input_key, label_key
    if kind == "image":
      channels = features[input_key].shape[-1]
      return Images(source, *keys, label.num_classes, where, channels)
    others = [key for key, f in features.items() if _is_text(f) and key != input_key]
    return Texts(source, *keys, label.num_classes, where, others)

  names = tuple(label.names)
  return Task(
    name, kind, read("train"), read("test"), label.num_classes, names, preset.flip
  )


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
