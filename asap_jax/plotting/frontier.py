"""Fidelity against time: of families of operators, and of a compiled model."""

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from asap_jax.compiler.report import Alternative, Report
from asap_jax.plotting.style import STYLES, axes_or_new, grid, titled

CUTS_FAMILY = "Sinkhorn cut short"


def plot_frontier(
  series: Mapping[str, Sequence[Alternative]],
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws fidelity against time: what is lower and further left is better.

  A family that holds a cut Sinkhorn (`sinkhorn@k`) is a curve through its points in
  their order, labelled with the iterations; any other is markers with their labels.

  Args:
    series: points of each family, by its name; a point that is not finite is warned
      about and not drawn.
    axes: where to draw, those of a new figure by default.
    title: above the axes.

  Returns:
    The axes; without `axes`, `.figure` is the new figure.

  Raises:
    ValueError: if there are no points.
  """
  if not any(series.values()):
    raise ValueError(
      f"series={dict(series)} holds no points: expected a family with at least one"
    )
  axes = axes_or_new(axes, 6.0, 4.0)
  styles = 0
  style: dict[str, Any]
  for family, given in series.items():
    points = _finite(family, given)
    if any(point.cut is not None for point in points):
      style = {"color": "black", "linestyle": "-", "marker": "o", "markersize": 5}
    else:
      marker, colour = STYLES[styles % len(STYLES)]
      style = {"color": colour, "linestyle": "", "marker": marker, "markersize": 9}
      styles += 1
    times = [point.milliseconds for point in points]
    axes.plot(times, [point.tv for point in points], label=family, **style)
    for point in points:
      axes.annotate(
        point.label if point.cut is None else f"@{point.cut}",
        (point.milliseconds, point.tv),
        textcoords="offset points",
        xytext=(6, 4),
        fontsize="small",
      )
  axes.margins(0.12)
  axes.autoscale_view()
  axes.set(
    xlabel="attention operator, ms",
    ylabel="total variation to the teacher",
    xlim=(0.0, None),
    ylim=(0.0, None),
  )
  axes.legend()
  return titled(axes, title)


def plot_report(
  report: Report, axes: Sequence[Axes] | np.ndarray | None = None
) -> np.ndarray:
  """Draws the alternatives of every layer that has some, a panel each.

  The teacher closes the curve of cut Sinkhorn, and a ring marks what was chosen. Panels
  of a new figure share their limits.

  Args:
    report: of a compiled model.
    axes: where to draw, as many as there are such layers; a new figure by default.

  Returns:
    The axes, `[layers]`.

  Raises:
    ValueError: if no alternatives were measured, or `axes` are not as many.
  """
  layers = [layer for layer in report.layers if layer.alternatives]
  if not layers:
    raise ValueError(
      "report holds no alternatives: expected some measured on at least one layer"
    )
  given = None if axes is None else np.asarray(axes, dtype=object).ravel()
  panels = grid(len(layers), 4.3) if given is None else given
  if len(panels) != len(layers):
    raise ValueError(
      f"axes holds {len(panels)} axes: expected {len(layers)}, one for every layer "
      "with alternatives"
    )
  for layer, panel in zip(layers, panels, strict=True):
    standing = layer.standing
    cuts = [point for point in layer.alternatives if point.cut is not None]
    cuts.sort(key=operator.attrgetter("cut"))
    teacher = Alternative("teacher", 0.0, layer.teacher_milliseconds)
    others = [
      point
      for point in layer.alternatives
      if point.cut is None and point.label != "teacher"
    ]
    if standing not in (*cuts, *others) and standing.label != "teacher":
      others.append(standing)
    compared = {CUTS_FAMILY: [*cuts, teacher]} | (
      {"compiled": others} if others else {}
    )
    plot_frontier(compared, panel, layer.name)
    panel.plot(
      standing.milliseconds,
      standing.tv,
      label="chosen",
      linestyle="",
      marker="o",
      markersize=16,
      markerfacecolor="none",
      markeredgecolor="#d55e00",
      markeredgewidth=1.5,
      scalex=False,
      scaley=False,
      clip_on=False,
    )
    panel.legend()
  if axes is None:
    right, top = (
      max(limits[1] for limits in every)
      for every in zip(*((p.get_xlim(), p.get_ylim()) for p in panels), strict=True)
    )
    for panel in panels:
      panel.set(xlim=(0.0, right), ylim=(0.0, top))
    for panel in panels[1:]:
      panel.get_legend().remove()
  return panels


def _finite(family: str, points: Sequence[Alternative]) -> list[Alternative]:
  """The points that can be drawn, with a warning about the others."""
  kept = [p for p in points if math.isfinite(p.tv) and math.isfinite(p.milliseconds)]
  if len(kept) < len(points):
    bad = [point.label for point in points if point not in kept]
    warnings.warn(f"{family}: {bad} are not finite and are not drawn", stacklevel=3)
  return kept
