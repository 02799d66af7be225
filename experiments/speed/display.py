"""Rows of `experiments.speed` as a table and as figures."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def curves(
  rows: Sequence[dict[str, Any]], name: str
) -> dict[tuple[str, str, int | None], list[tuple[int, float]]]:
  """`(length, value)` of every method, implementation and number of slices.

  Values are divided by sequences and heads, as shapes differ in them. Padded batches
  are left out.
  """
  found: dict[tuple[str, str, int | None], list[tuple[int, float]]] = {}
  for row in rows:
    if row.get("padded"):
      continue
    key = row["method"], row["implementation"], row.get("slices")
    points = found.setdefault(key, [])
    if row[name]:  # no bytes have no logarithm
      points.append((row["length"], row[name] / (row["batch"] * row["heads"])))
  return found


def scaling_exponent(points: Sequence[tuple[float, float]]) -> float | None:
  """p of the power law value ~ length^p, by least squares of logarithms.

  `None` where there are fewer than two lengths.
  """
  if len({length for length, _ in points}) < 2:
    return None
  lengths, values = np.log(np.transpose(points))
  return float(np.polyfit(lengths, values, 1)[0])


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed, with the exponents of the time against the length."""
  exponents = {
    key: scaling_exponent(points)
    for key, points in curves(rows, "milliseconds").items()
  }
  shown = []
  for row in rows:
    key = row["method"], row["implementation"], row.get("slices")
    exponent = None if row["padded"] else exponents[key]
    temp, ratio = row["temp_bytes"], row.get("ratio_to_softmax")
    shown.append(
      {
        "method": row["method"],
        "implementation": row["implementation"],
        "slices": row.get("slices"),
        "b x h": f"{row['batch']} x {row['heads']}",
        "length": f"{row['length']}{', padded' * row['padded']}",
        "ms": _digits(row["milliseconds"]),
        "quartiles": " - ".join(map(_digits, row["quartiles"])),
        "ratio": None if ratio is None else f"{ratio:.2f}",
        "MiB": None if temp is None else f"{temp / 2**20:.1f}",
        "exponent": None if exponent is None else f"{exponent:.2f}",
      }
    )
  return shown


def _digits(value: float) -> str:
  """Three significant digits, and none that are not."""
  decimals = max(0, 2 - math.floor(math.log10(value)))
  return f"{value:.{decimals}f}"


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> list[pathlib.Path]:
  """Time and memory against the length; the files drawn, none without Matplotlib."""
  try:
    from matplotlib.figure import Figure

    from asap_jax.plotting import plot_scaling
  except ImportError:
    print("Matplotlib is not installed: no figures")
    return []
  # Of the numbers of slices the first alone, for legibility.
  slices = next((row["slices"] for row in rows if "slices" in row), None)
  kept = [row for row in rows if row.get("slices", slices) == slices]
  steps = [row for row in kept if row["method"].endswith("_step")]
  panels = {
    "attention": [row for row in kept if row not in steps],
    "training step": steps,
  }
  panels = {title: of_panel for title, of_panel in panels.items() if of_panel}
  figure = Figure(figsize=(13.0, 5.4 * len(panels)), layout="constrained")
  grid = figure.subplots(len(panels), 2, squeeze=False)
  for (title, of_panel), (left, right) in zip(panels.items(), grid, strict=True):
    for axes, name, label in (
      (left, "milliseconds", "ms per sequence and head"),
      (right, "temp_bytes", "temporary bytes per sequence and head"),
    ):
      series = {key[:2]: points for key, points in curves(of_panel, name).items()}
      if any(series.values()):
        plot_scaling(series, axes, label, title)
        axes.get_legend().remove()
    right.legend(
      *left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
  figure.savefig(path, dpi=150)
  return [path]
