"""Fidelity against time: of families of operators, and of a compiled model."""

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes

from asap_jax.plotting.style import axes_or_new, series_style, subplots, titled

CUTS_FAMILY = "Sinkhorn cut short"


# Not the classes of `asap_jax.compiler`: its reports draw themselves by this module.
@runtime_checkable
class Point(Protocol):
  """Measured operator, such as `asap_jax.compiler.Alternative`."""

  @property
  def label(self) -> str:
    """Name of the operator."""

  @property
  def tv(self) -> float:
    """Total variation distance to the teacher's plan."""

  @property
  def milliseconds(self) -> float:
    """Time of a call."""

  @property
  def cut(self) -> int | None:
    """Iterations, if it is Sinkhorn cut short."""


@runtime_checkable
class Reported(Protocol):
  """Report of a compiled model, such as `asap_jax.compiler.Report`."""

  @property
  def layers(self) -> Sequence[Any]:
    """Layers with a `name`, and as `Point` `alternatives`, `teacher` and `standing`."""


def plot_frontier(
  series: Mapping[str, Sequence[Point]],
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws fidelity against time: what is lower and further left is better.

  A family that holds a cut Sinkhorn (`sinkhorn@k`) is a curve through its points in
  their order, labelled with the iterations; any other is markers with their labels.

  Args:
    series: points of each family, by its name; a point that is not finite is warned
      about and not drawn.
    axes: where to draw; a new figure by default.
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
  for family, given in series.items():
    points = [p for p in given if math.isfinite(p.tv) and math.isfinite(p.milliseconds)]
    if len(points) < len(given):
      bad = [point.label for point in given if point not in points]
      warnings.warn(f"{family}: {bad} are not finite and are not drawn", stacklevel=2)
    if any(point.cut is not None for point in points):
      style = series_style(0) | {"markersize": 5}
    else:
      styles += 1
      style = series_style(styles) | {"linestyle": "", "markersize": 9}
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
  axes.set(xlabel="attention operator, ms", ylabel="total variation to the teacher")
  axes.set(xlim=(0.0, None), ylim=(0.0, None))
  axes.legend()
  return titled(axes, title)


def plot_report(
  report: Reported, axes: Sequence[Axes] | np.ndarray | None = None
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
  if axes is None:
    all_panels = subplots(-(-len(layers) // 3), min(3, len(layers)), width=4.3).ravel()
    for panel in all_panels[len(layers) :]:
      panel.remove()
    panels = all_panels[: len(layers)]
  else:
    panels = np.asarray(axes, dtype=object).ravel()
  if len(panels) != len(layers):
    raise ValueError(
      f"axes holds {len(panels)} axes: expected {len(layers)}, one for every layer "
      "with alternatives"
    )
  for layer, panel in zip(layers, panels, strict=True):
    standing, teacher = layer.standing, layer.teacher
    points = list(layer.alternatives)
    if standing not in points:
      points.append(standing)
    cuts = [point for point in points if point.cut is not None]
    cuts.sort(key=operator.attrgetter("cut"))
    others = [p for p in points if p.cut is None and p.label != teacher.label]
    compared = {CUTS_FAMILY: [*cuts, teacher]}
    if others:
      compared["compiled"] = others
    plot_frontier(compared, panel, layer.name)
    ring = {"marker": "o", "markersize": 16, "markerfacecolor": "none", "linestyle": ""}
    ring |= {"markeredgecolor": "#d55e00", "markeredgewidth": 1.5, "label": "chosen"}
    # It neither moves the limits nor is cut off by them.
    apart = {"scalex": False, "scaley": False, "clip_on": False}
    panel.plot(standing.milliseconds, standing.tv, **ring, **apart)
    panel.legend()
  if axes is None:
    right = max(panel.get_xlim()[1] for panel in panels)
    top = max(panel.get_ylim()[1] for panel in panels)
    for panel in panels:
      panel.set(xlim=(0.0, right), ylim=(0.0, top))
    for panel in panels[1:]:
      panel.get_legend().remove()
  return panels
