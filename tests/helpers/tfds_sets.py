"""Small data sets: as TFDS directories, written without TensorFlow, or in memory."""

import io
import itertools
import json
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from helpers.pages import ROOT
from PIL import Image

from experiments.datasets.tasks import Task

SHARED = ROOT.parent / "shared" / "tfds"


def png(pixels: np.ndarray) -> bytes:
  """A uint8 image [height, width, channels], encoded."""
  file = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(file, "png")
  return file.getvalue()


def write(
  folder: pathlib.Path,
  name: str,
  features: dict,
  splits: dict[str, list[dict]],
  supervised: tuple[str, str] | None = None,
) -> pathlib.Path:
  """Writes `folder/name/1.0.0` in the order of `splits`, and returns `folder`."""
  directory = folder / name / "1.0.0"
  directory.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(
    name=name.split("/")[0],
    version=tfds.core.Version("1.0.0"),
    data_dir=str(directory),
    module_name="",
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    features=tfds.features.FeaturesDict(features),
    supervised_keys=supervised,
    disable_shuffling=True,
  )
  writer = tfds.core.SequentialWriter(info, 10_000, file_format="array_record")
  writer.initialize_splits(list(splits))
  writer.add_examples(splits)
  writer.close_all()
  return folder


def texts(pairs: list[tuple[str, int]], key: str = "text") -> list[dict]:
  return [{key: text, "label": label} for text, label in pairs]


def text_features(classes: int = 2, key: str = "text") -> dict:
  return {
    key: tfds.features.Text(),
    "label": tfds.features.ClassLabel(num_classes=classes),
  }


def image_features(shape=(None, None, 3), classes: int = 2) -> dict:
  return {
    "image": tfds.features.Image(shape=shape),
    "label": tfds.features.ClassLabel(num_classes=classes),
  }


def edit_json(file: pathlib.Path, old: str, new: str) -> None:
  """Replaces what must occur in a file of JSON."""
  content = file.read_text()
  assert old in content
  file.write_text(content.replace(old, new))
  json.loads(file.read_text())


def review_task():
  """Texts whose words tell the class."""
  rng = np.random.default_rng(0)
  words = (("bad", "dull", "boring"), ("good", "fine", "great"))
  rows = []
  for label in rng.integers(2, size=60):
    chosen = rng.choice(words[label], size=rng.integers(3, 9))
    rows.append({"input": "the film was " + " ".join(chosen), "label": int(label)})
  return Task("reviews", "text", rows[:40], rows[40:], 2, ("neg", "pos"))


def take(iterator, count):
  return list(itertools.islice(iterator, count))


def assert_same(found, expected):
  assert len(found) == len(expected)
  for one, other in zip(found, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])
