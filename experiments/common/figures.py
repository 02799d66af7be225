"""Figures of rows: accuracies, and fidelity against time."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from asap_jax import plotting
from asap_jax.compiler import Alternative

Rows = Sequence[Mapping[str, Any]]


def draw_accuracy(panels: Sequence[tuple[str, Rows]], path: pathlib.Path) -> None:
  """Accuracy of every method with its deviation, a panel for each title and rows."""
  kept = [
    (title, measured)
    for title, rows in panels
    if (measured := [r for r in rows if "accuracy" in r and "shift" not in r])
  ]
  most = max(len(rows) for _, rows in kept)
  figure = Figure(
    figsize=(1.5 + 3.2 * len(kept), 1.2 + 0.3 * most), layout="constrained"
  )
  grid = figure.subplots(1, len(kept), squeeze=False)[0]
  for axes, (title, rows) in zip(grid, kept, strict=True):
    places = range(len(rows))
    axes.errorbar(
      [row["accuracy"] for row in rows],
      places,
      xerr=[row.get("accuracy_std") or 0.0 for row in rows],
      linestyle="",
      marker="o",
      color="#0072b2",
      capsize=2,
    )
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set(title=title, xlabel="test accuracy")
  figure.savefig(path, dpi=150)


def frontier_of(rows: Rows) -> dict[str, list[Alternative]]:
  """Fidelity and time of every method that has both, by family; {} without cuts.

  The teacher ends the curve of the cuts.
  """
  points = [
    Alternative(row["method"], row["tv"], row["milliseconds"])
    for row in rows
    if {"tv", "milliseconds"} <= row.keys() and "shift" not in row
  ]
  cuts = [point for point in points if point.cut is not None]
  teachers = [
    Alternative("teacher", 0.0, point.milliseconds)
    for point in points
    if point.label == "sinkhorn"
  ]
  if not (cuts and teachers):
    return {}
  families = {
    plotting.CUTS_FAMILY: [*cuts, *teachers],
    "softmax in its place": [p for p in points if p.label == "softmax_swap"],
    "ridge, random slices": [p for p in points if p.label == "ridge"],
    "compiled": [p for p in points if p.label == "best" or p.label.startswith("asap")],
  }
  return {name: found for name, found in families.items() if found}


def draw_frontier(
  rows: Rows,
  path: pathlib.Path,
  *,
  title: str | None = None,
  time: str = "ms, as the experiment takes them",
) -> None:
  """TV to the teacher's plan against the time, whose axis is labelled `time`."""
  axes = plotting.plot_frontier(frontier_of(rows), title=title)
  axes.set_xlabel(time)
  figure = axes.get_figure()
  assert isinstance(figure, Figure)
  figure.savefig(path, dpi=150)
