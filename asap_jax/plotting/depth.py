"""Curves, and what happens to tokens through the depth of a model."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from asap_jax.plotting.style import (
  array_like,
  array_of,
  axes_or_new,
  series_style,
  titled,
)

# Markers of more points would run into each other.
_MARKED_POINTS = 12


def plot_curves(
  curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
  axes: Axes | None = None,
  title: str | None = None,
  *,
  xlabel: str = "",
  ylabel: str = "",
) -> Axes:
  """Draws curves that are told apart by colour, marker and line.

  Args:
    curves: `(x, y)`, `[points]` each, by name.
    axes: where to draw; a new figure by default.
    title: above the axes.
    xlabel: what x is.
    ylabel: what y is.

  Returns:
    The axes.

  Raises:
    ValueError: if there are no curves, or x and y are not as many.
  """
  if not curves:
    raise ValueError("curves is empty: expected at least one")
  checked = {}
  for name, (x, y) in curves.items():
    x = array_of(f"{name}, x", x, "[points]", (1,))
    checked[name] = x, array_like(f"{name}, y", y, "x", x)
  axes = axes_or_new(axes, 5.0, 3.2)
  for index, (name, (x, y)) in enumerate(checked.items()):
    every = max(1, len(x) // _MARKED_POINTS)
    axes.plot(x, y, label=name, markevery=every, **series_style(index))
  axes.set(xlabel=xlabel, ylabel=ylabel)
  axes.grid(alpha=0.3)
  # Beside the axes where it would cover them.
  beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
  axes.legend(**(beside if len(curves) > 4 else {}))
  return titled(axes, title)


def plot_rank(
  residuals: Mapping[str, Sequence[float] | ArrayLike],
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws how far tokens are from being all alike, after each block of some models.

  Args:
    residuals: `asap_jax.metrics.rank_residual` of the tokens that enter the first
      block and of those that leave each block, `[blocks + 1]`, by model.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes; models are drawn a little apart, as many pass the same points.

  Raises:
    ValueError: if there are no models, or one has no residuals.
  """
  if not residuals:
    raise ValueError("residuals is empty: expected at least one model")
  last = max(1, len(residuals) - 1)
  curves = {}
  for index, (name, values) in enumerate(residuals.items()):
    values = array_of(name, values, "[blocks + 1]", (1,))
    aside = 0.3 * (index / last - 0.5) if len(residuals) > 1 else 0.0
    curves[name] = (np.arange(len(values)) + aside, values)
  labels = {"xlabel": "blocks passed", "ylabel": "rank residual of the tokens"}
  axes = plot_curves(curves, axes, title, **labels)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  return axes


def plot_paths(
  residual: ArrayLike,
  column_gain: ArrayLike,
  least_singular: ArrayLike,
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws what products of plans keep through depth, on a logarithmic axis.

  Args:
    residual: rank residual of the products, `[layers, heads]`, as
      `asap_jax.diagnose` finds it; means over heads are drawn.
    column_gain: largest sum of a column, likewise.
    least_singular: smallest singular value, likewise.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes. What is zero is not drawn.

  Raises:
    ValueError: if the three have not the same shape.
  """
  first = array_of("residual", residual, "[layers, heads]", (2,))
  arrays = {
    "rank residual": first,
    "column gain": array_like("column_gain", column_gain, "residual", first),
    "least singular value": array_like(
      "least_singular", least_singular, "residual", first
    ),
  }
  curves = {}
  for name, array in arrays.items():
    means = array.mean(-1)
    curves[name] = (np.arange(1, len(means) + 1), np.where(means > 0, means, np.nan))
  labels = {"xlabel": "layers in the product", "ylabel": "mean over heads"}
  axes = plot_curves(curves, axes, title, **labels)
  axes.set_yscale("log")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  return axes
