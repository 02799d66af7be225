"""Data to train on, to choose by, and to shift to."""

import numpy as np
import pytest
from helpers.small_training import PRESET, images, task, texts

from experiments.datasets.tasks import Task
from experiments.downstream import data as sources
from experiments.downstream.presets import PRESETS


def test_a_part_of_the_training_split_is_held_out(tmp_path):
  data = sources.load(task(), PRESET, tmp_path, test_limit=24)
  assert [len(part["label"]) for part in (data.train, data.held_out)] == [90, 10]
  assert len(data.prepared.test["label"]) == 24
  rows = lambda part: sorted(map(tuple, part["ids"]))  # noqa: E731
  both = sorted(rows(data.train) + rows(data.held_out))
  assert both == rows(data.prepared.train)


def test_few_training_examples(tmp_path):
  few = task()._replace(train=texts(9, 0))
  with pytest.raises(ValueError, match="news: 9 training examples, expected at least"):
    sources.load(few, PRESET, tmp_path)


@pytest.mark.parametrize(
  ("side", "expected"),
  [((8, 8), None), ((64, 64), None), ((30, 30), 32), ((8, 12), 32)],
)
def test_large_and_odd_images_are_scaled(side, expected):
  preset = PRESETS["tiny"]["image"]
  one = [{"input": np.zeros((*side, 3), np.uint8), "label": 0}]
  given = Task("images", "image", one, one, 2, ("a", "b"))
  assert sources.image_size_of(given, preset) == expected


def test_images_whose_sizes_may_differ_are_scaled():
  preset = PRESETS["tiny"]["image"]
  one = [{"input": np.zeros((8, 8, 3), np.uint8), "label": 0}]
  given = Task("images", "image", one, one, 2, ("a", "b"), sizes_differ=True)
  assert sources.image_size_of(given, preset) == 32


def test_examples_that_are_decoded_when_asked():
  source = images(7)
  found = sources.take(source, np.array([5, 1, 3]))
  assert len(found) == sources.count_of(found) == 3
  np.testing.assert_array_equal(found[1]["input"], source[1]["input"])
  read = [row["input"] for row in found.read([2, 0])]
  np.testing.assert_array_equal(read, [source[3]["input"], source[5]["input"]])


@pytest.mark.parametrize(
  ("count", "sizes"), [(200, [64] * 3), (128, [64] * 2), (70, [35] * 2), (7, [3] * 2)]
)
def test_calibration_batches_are_of_one_size(count, sizes):
  given = {"ids": np.arange(300)[:, None], "label": np.zeros(300, np.int32)}
  found = sources.whole_batches(given, None, count)
  assert [len(batch["ids"]) for batch in found] == sizes
  assert all(set(batch) == {"ids"} for batch in found)
  together = np.concatenate([batch["ids"][:, 0] for batch in found])
  np.testing.assert_array_equal(together, np.arange(sum(sizes)) * 300 // sum(sizes))


def test_texts_of_another_data_set(tmp_path):
  data = sources.load(task(), PRESET, tmp_path)
  other = Task("other", "text", texts(50, 7), [], 3, ())
  batches = sources.foreign_batches(other, task(), data, PRESET, tmp_path)
  assert [batch["ids"].shape for batch in batches] == [(16, 8)] * 2
  # The teacher's tokenizer is taken, for its tokens are what the teacher knows.
  known = {tuple(row) for row in data.prepared.train["ids"][:, :1]}
  first = np.concatenate([batch["ids"] for batch in batches])[:, :1]
  assert set(map(tuple, first)) <= known


def test_images_of_another_data_set(tmp_path):
  colour = Task("colour", "image", images(20), images(4), 2, ("a", "b"))
  preset = PRESETS["tiny"]["image"]
  data = sources.load(colour, preset, tmp_path)
  other = Task("other", "image", images(20), images(20), 2, ("a", "b"))
  first, _ = sources.foreign_batches(other, colour, data, preset, tmp_path)
  assert first["image"].shape == (10, 8, 8, 3)


def test_data_sets_that_the_teacher_cannot_read(monkeypatch):
  colour = Task("colour", "image", images(4), images(4), 2, ("a", "b"))
  grey = [{**row, "input": row["input"][..., :1]} for row in images(4)]
  known = {
    "colour": colour,
    "grey": Task("grey", "image", grey, grey, 2, ("a", "b")),
    "news": task(),
  }
  monkeypatch.setattr(sources, "load_task", lambda name, data_dir: known[name])
  assert sources.foreign_task("colour", colour, None) is colour
  for name, of, expected in (
    ("colour", task(), "colour holds images: news holds texts"),
    ("news", colour, "news holds texts: colour holds images"),
    ("grey", colour, "grey has images of 1 channels: colour has 3"),
  ):
    with pytest.raises(ValueError, match=expected):
      sources.foreign_task(name, of, None)
