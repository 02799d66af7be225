"""Accuracy of linear classifiers, for comparison."""

from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from experiments.datasets.examples import Examples, evenly, read_many
from experiments.datasets.images import fit
from experiments.datasets.tasks import Task

_TEXTS = 50_000  # training texts at most
_IMAGES = 10_000  # training images at most, as test images
_SIDE = 16  # pixels of an image's side at most


def linear_baseline(task: Task) -> float:
  """Test accuracy, 0 to 1, of logistic regression.

  It sees of a text the words and pairs of words that at least two training texts have,
  weighted by TF-IDF with a logarithmic term frequency, and of an image its pixels,
  scaled down to 16 x 16. Large sets are reduced to 50,000 training texts, or to 10,000
  training and test images, drawn evenly.
  """
  limits: tuple[int, int | None]
  if task.kind == "text":
    words = TfidfVectorizer(
      ngram_range=(1, 2),
      sublinear_tf=True,
      min_df=2 if len(task.train) >= 1000 else 1,
      dtype=np.float32,
    )
    model = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    limits = _TEXTS, None
  else:
    model = LogisticRegression(C=0.1, max_iter=1000)
    limits = _IMAGES, _IMAGES
  side = None if task.kind == "text" else _side(task)
  train, test = (
    _inputs_and_labels(examples, limit, side)
    for examples, limit in zip((task.train, task.test), limits, strict=True)
  )
  model.fit(*train)
  return float(model.score(*test))


def _side(task: Task) -> int:
  return min(_SIDE, *task.train[0]["input"].shape[:2])


def _inputs_and_labels(
  examples: Examples, limit: int | None, side: int | None
) -> tuple[Any, np.ndarray]:
  rows = read_many(examples, evenly(examples, limit))
  inputs: Any = []
  labels = []
  for row in rows:
    given = row["input"]
    inputs.append(given if side is None else fit(given, side).reshape(-1))
    labels.append(row["label"])
  if side is not None:
    inputs = np.stack(inputs) / np.float32(255)
  return inputs, np.array(labels)
