"""Figures: functions of arrays that draw on Matplotlib axes and return them."""

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike


def plot_plan(
  plan: ArrayLike, axes: Axes, title: str = "", *, maximum: float | None = None
) -> Axes:
  """Draws a plan as an image: queries down, keys across, dark where mass lies.

  Args:
    plan: attention weights `[n, m]`.
    axes: where to draw.
    title: above the image.
    maximum: weight that is drawn black, the plan's largest by default; give plans side
      by side the same.

  Returns:
    The axes.

  Raises:
    ValueError: if `plan` is not a matrix.
  """
  plan = np.asarray(plan)
  if plan.ndim != 2:
    raise ValueError(f"plan has shape {plan.shape}: expected [n, m]")
  axes.imshow(plan, cmap="Greys", vmin=0.0, vmax=maximum, interpolation="nearest")
  axes.set(title=title, xlabel="key", ylabel="query", xticks=[], yticks=[])
  return axes


def plot_column_sums(plan: ArrayLike, axes: Axes) -> Axes:
  """Draws what each key receives, relative to what a doubly stochastic plan gives it.

  Args:
    plan: attention weights `[n, m]`, without padding.
    axes: where to draw.

  Returns:
    The axes; the line at 1 is double stochasticity.

  Raises:
    ValueError: if `plan` is not a matrix.
  """
  plan = np.asarray(plan)
  if plan.ndim != 2:
    raise ValueError(f"plan has shape {plan.shape}: expected [n, m]")
  sums = plan.sum(0) * plan.shape[1] / plan.shape[0]
  axes.bar(np.arange(len(sums)), sums, width=1.0, color="#0072b2")
  axes.axhline(1.0, color="black", linewidth=1.0, linestyle="--")
  error = np.abs(sums - 1.0).mean()
  axes.set(xlabel=f"key: mean column error {error:.3f}", xlim=(-0.5, len(sums) - 0.5))
  axes.set_xticks([])
  return axes
