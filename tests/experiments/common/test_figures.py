"""Figures of rows."""

import pytest

from experiments.common.figures import draw_accuracy, draw_frontier, frontier_of

ROWS = [
  {"method": "sinkhorn", "accuracy": 0.9, "tv": 0.0, "milliseconds": 9.0},
  {"method": "sinkhorn@1", "accuracy": 0.8, "tv": 0.2, "milliseconds": 2.0},
  {"method": "asap", "accuracy": 0.89, "tv": 0.01, "milliseconds": 4.0},
  {"method": "asap", "shift": "half length", "tv": 0.1, "milliseconds": 4.0},
]


def test_frontier_needs_cuts_and_their_teacher():
  families = frontier_of(ROWS)
  assert [point.label for point in families["Sinkhorn cut short"]] == [
    "sinkhorn@1",
    "teacher",
  ]
  assert [point.tv for point in families["compiled"]] == [0.01]
  assert set(families) == {"Sinkhorn cut short", "compiled"}
  assert frontier_of(ROWS[1:]) == {}
  assert frontier_of([*ROWS[:1], *ROWS[2:]]) == {}
  assert frontier_of([{"method": "softmax", "milliseconds": 1.5}]) == {}


def test_figures_are_written(tmp_path):
  panels = [("one", ROWS), ("none", [{"method": "softmax"}]), ("one", ROWS)]
  draw_accuracy(panels, tmp_path / "accuracy.png")
  draw_frontier(ROWS, tmp_path / "frontier.png", title="one", time="ms")
  for path in tmp_path.iterdir():
    assert path.stat().st_size > 5_000
  with pytest.raises(ValueError, match="holds no points"):
    draw_frontier(ROWS[1:], tmp_path / "none.png")
