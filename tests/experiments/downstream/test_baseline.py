"""Linear classifiers."""

import numpy as np
from helpers.tfds_sets import review_task

from experiments.datasets.tasks import Task
from experiments.downstream.baseline import linear_baseline


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
