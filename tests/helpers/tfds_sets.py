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


def jpeg(pixels: np.ndarray) -> bytes:
  """As `png`, with loss."""
  file = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(file, "jpeg")
  return file.getvalue()


def _split(make, count: int, classes: int, seed: int) -> list[dict]:
  rng = np.random.default_rng(seed)
  return [make(rng, i % classes) for i in range(count)]


def _sentence(rng: np.random.Generator, label: int) -> str:
  own = [f"word{label}"] * 3 + ["a", "the", "is", "of", "new", "place"]
  return " ".join(rng.choice(own, size=rng.integers(4, 12)))


def write_dbpedia(folder: pathlib.Path) -> pathlib.Path:
  """As TFDS prepares it from Hugging Face; one text is not UTF-8."""
  features = {
    "label": tfds.features.ClassLabel(names=[f"Kind {i}" for i in range(14)]),
    "title": tfds.features.Scalar(np.object_),
    "content": tfds.features.Scalar(np.object_),
  }

  def make(rng, label):
    content = " " + _sentence(rng, label)
    return {"label": label, "title": f"Name {label}", "content": content}

  splits = {"train": _split(make, 70, 14, 0), "test": _split(make, 28, 14, 1)}
  splits["train"][3]["content"] = b"caf\xe9 in word3"
  return write(folder, "fancyzhx__dbpedia_14/dbpedia_14", features, splits)


def write_yelp(folder: pathlib.Path) -> pathlib.Path:
  """As TFDS prepares it from Hugging Face, line ends and quotes as they are there."""
  features = {
    "label": tfds.features.ClassLabel(
      names=["1 star", *(f"{i} stars" for i in "2345")]
    ),
    "text": tfds.features.Scalar(np.object_),
  }

  def make(rng, label):
    text = f'{_sentence(rng, label)}.\\n\\nI \\"like\\" it'
    return {"label": label, "text": text}

  splits = {"train": _split(make, 60, 5, 0), "test": _split(make, 20, 5, 1)}
  return write(folder, "yelp_review_full/yelp_review_full", features, splits)


def write_cats(folder: pathlib.Path) -> pathlib.Path:
  """As TFDS's own: images of any size, some grey, the first small; no test split."""
  features = {
    "image": tfds.features.Image(),
    "image/filename": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
  }

  def make(rng, label):
    shape = *rng.integers(40, 120, size=2), 1 if rng.random() < 0.2 else 3
    pixels = rng.integers(256, size=shape, dtype=np.uint8)
    return {"image": jpeg(pixels), "image/filename": "PetImages/1.jpg", "label": label}

  rows = _split(make, 60, 2, 0)
  small = np.zeros((32, 32, 3), np.uint8)
  rows[0]["image"] = jpeg(small)
  # In order of the classes, as they are at Hugging Face.
  rows.sort(key=lambda row: row["label"])
  return write(folder, "cats_vs_dogs", features, {"train": rows})


def write_cifar100(folder: pathlib.Path) -> pathlib.Path:
  """As TFDS's own, with fewer images than classes."""
  features = {
    "id": tfds.features.Text(),
    "image": tfds.features.Image(shape=(32, 32, 3)),
    "label": tfds.features.ClassLabel(num_classes=100),
    "coarse_label": tfds.features.ClassLabel(num_classes=20),
  }

  def make(rng, coarse):
    image, fine = png(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)), 5 * coarse
    return {"id": "train_1", "image": image, "label": fine, "coarse_label": coarse}

  splits = {"train": _split(make, 60, 20, 0), "test": _split(make, 20, 20, 1)}
  return write(folder, "cifar100", features, splits)


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
