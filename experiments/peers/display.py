"""Rows of `experiments.peers` as a table and as a figure."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from asap_jax.plotting import plot_rank, series_style, subplots
from experiments.common.results import with_spread

MIB = 2**20


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed."""
  return [
    {
      "method": row["method"],
      "accuracy": with_spread(row, 3),
      "ms": f"{row['milliseconds']:.1f}",
      "step ms": f"{row['step_milliseconds']:.1f}",
      "MiB": _mib(row["temp_bytes"]),
      "step MiB": _mib(row["step_temp_bytes"]),
      "row err": f"{row['row_error']:.1e}",
      "col err": f"{row['column_error']:.1e}",
      "sink": f"{row['attention_sink_share']:.4f}",
      "rank residual": " ".join(f"{value:.2f}" for value in row["rank_residual"]),
    }
    for row in rows
  ]


def _mib(count: int | None) -> str | None:
  return None if count is None else f"{count / MIB:.1f}"


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Accuracy against the time of a forward pass, and rank residual through depth."""
  ((left, right),) = subplots(1, 2, width=5.5, height=4.6)
  for index, row in enumerate(rows):
    _draw_accuracy(left, row, series_style(index) | {"markersize": 8})
  plot_rank({row["method"]: row["rank_residual"] for row in rows}, right)
  left.set(
    xscale="log",
    xlabel="forward pass, ms (median, quartiles)",
    ylabel="test accuracy (mean, deviation over seeds)",
  )
  left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
  left.xaxis.set_minor_locator(NullLocator())
  left.grid(alpha=0.3)
  left.figure.savefig(path, dpi=150)


def _draw_accuracy(axes: Axes, row: dict[str, Any], style: dict[str, Any]) -> None:
  middle, (first, third) = row["milliseconds"], row["quartiles"]
  axes.errorbar(
    middle,
    row["accuracy"],
    yerr=row.get("accuracy_std", 0.0),
    xerr=[[middle - first], [third - middle]],
    capsize=2,
    **style | {"linestyle": ""},
  )
