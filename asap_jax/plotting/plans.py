"""Plans, and what their keys receive."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from asap_jax.plotting.depth import plot_curves
from asap_jax.plotting.style import array_of, axes_or_new, subplots

# Above this quantile weights are drawn alike: a few large ones would hide the rest.
_BLACK_QUANTILE = 0.995


def plot_plan(
  plan: ArrayLike,
  axes: Axes | None = None,
  title: str = "",
  *,
  maximum: float | None = None,
) -> Axes:
  """Draws a plan as an image: queries down, keys across, dark where mass lies.

  Args:
    plan: attention weights `[n, m]`.
    axes: where to draw; a new figure by default.
    title: above the image.
    maximum: weight that is drawn black, the plan's largest by default; plans that are
      compared need one value.

  Returns:
    The axes.

  Raises:
    ValueError: if `plan` is not a matrix.
  """
  plan = array_of("plan", plan, "[n, m]", (2,))
  axes = axes_or_new(axes, 3.2, 3.4)
  axes.imshow(plan, cmap="Greys", vmin=0.0, vmax=maximum, interpolation="nearest")
  axes.set(title=title, xlabel="key", ylabel="query", xticks=[], yticks=[])
  return axes


def plot_column_sums(plan: ArrayLike, axes: Axes | None = None) -> Axes:
  """Draws what each key receives, relative to what a doubly stochastic plan gives it.

  Args:
    plan: attention weights `[n, m]`, without padding.
    axes: where to draw; a new figure by default.

  Returns:
    The axes; the line at 1 is double stochasticity.

  Raises:
    ValueError: if `plan` is not a matrix.
  """
  sums = _received("plan", plan, "[n, m]", (2,))
  axes = axes_or_new(axes, 3.2, 1.6)
  axes.bar(np.arange(len(sums)), sums, width=1.0, color="#0072b2")
  axes.axhline(1.0, color="black", linewidth=1.0, linestyle="--")
  error = np.abs(sums - 1.0).mean()
  axes.set(xlabel=f"key: mean column error {error:.3f}", xlim=(-0.5, len(sums) - 0.5))
  axes.set_xticks([])
  return axes


def plot_plans(
  plans: Mapping[str, ArrayLike],
  axes: np.ndarray | None = None,
  *,
  maximum: float | None = None,
) -> np.ndarray:
  """Draws plans side by side on one scale of greys, what their keys receive below.

  Args:
    plans: attention weights `[n, m]`, without padding, by title.
    axes: where to draw, `[2, plans]`; a new figure by default.
    maximum: weight that is drawn black; by default a quantile, 0.995, of the first
      plan's weights.

  Returns:
    The axes, `[2, plans]`.

  Raises:
    ValueError: if there are no plans, one is not a matrix, or `axes` do not fit.
  """
  if not plans:
    raise ValueError("plans is empty: expected at least one")
  shown = {name: array_of(name, plan, "[n, m]", (2,)) for name, plan in plans.items()}
  if axes is None:
    options = {"height_ratios": (3, 1), "sharey": "row"}
    axes = subplots(2, len(plans), width=3.0, height=2.3, **options)
  if axes.shape != (2, len(plans)):
    raise ValueError(f"axes has shape {axes.shape}: expected [2, {len(plans)}]")
  if maximum is None:
    maximum = float(np.quantile(next(iter(shown.values())), _BLACK_QUANTILE))
  for (title, plan), above, below in zip(shown.items(), *axes, strict=True):
    plot_plan(plan, above, title, maximum=maximum)
    plot_column_sums(plan, below)
  for panel in axes[:, 1:].flat:
    panel.set_ylabel("")
  axes[1, 0].set_ylabel("received")
  return axes


def plot_sinks(
  plans: Mapping[str, ArrayLike], axes: Axes | None = None, title: str | None = None
) -> Axes:
  """Draws what keys receive, from the most to the least attended one of each plan.

  The first point is the attention sink: `asap_jax.metrics.attention_sink_share` times
  the keys. A doubly stochastic plan is the line at 1.

  Args:
    plans: attention weights `[..., n, m]`, without padding, by name; keys are put in
      order within each plan, and means taken over the leading axes.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes.

  Raises:
    ValueError: if there are no plans, or one has fewer than two axes.
  """
  if not plans:
    raise ValueError("plans is empty: expected at least one")
  received = {
    name: _received(name, plan, "[..., n, m]", range(2, 9))
    for name, plan in plans.items()
  }
  curves = {}
  for name, sums in received.items():
    ordered = -np.sort(-sums, axis=-1)
    ordered = ordered.reshape(-1, ordered.shape[-1]).mean(0)
    curves[name] = np.arange(1, len(ordered) + 1), ordered
  labels = {
    "xlabel": "keys, the most attended first",
    "ylabel": "received / fair share",
  }
  axes = plot_curves(curves, axes, title, **labels)
  axes.axhline(1.0, color="grey", linewidth=1.0, zorder=1.0)
  axes.set_ylim(0, None)
  return axes


def _received(
  name: str, plan: ArrayLike, expected: str, dims: Sequence[int]
) -> np.ndarray:
  """Column sums over n / m, `[..., m]`."""
  plan = array_of(name, plan, expected, dims)
  return plan.sum(-2) * plan.shape[-1] / plan.shape[-2]
