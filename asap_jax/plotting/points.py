"""Points on the line and in the plane: their potentials, duals and couplings."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from numpy.typing import ArrayLike

from asap_jax.plotting.style import (
  array_like,
  array_of,
  axes_or_new,
  series_style,
  titled,
)
from asap_jax.potentials.kantorovich import Potentials

# Couplings are drawn where they hold at least this share of their largest entry.
_FAINTEST = 0.02


def plot_potentials(
  x: ArrayLike,
  potentials: Potentials,
  y: ArrayLike | None = None,
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws one-dimensional potentials over marks of their points.

  Args:
    x: points `[n]`, in any order, without absent ones.
    potentials: of one problem, as `asap_jax.kantorovich_potentials` gives them.
    y: points `[m]` of the other side; without them phi is drawn alone.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes.

  Raises:
    ValueError: if points and potentials do not match, or there are none.
  """
  drawn = []
  for name, given, of_given in (("x", x, "phi"), ("y", y, "psi")):
    if given is None:
      continue
    points = array_of(name, given, "[n]", (1,))
    values = array_like(of_given, getattr(potentials, of_given), name, points)
    order = np.argsort(points)
    drawn.append((points[order], values[order], rf"$\{of_given}$ of {name}"))
  axes = axes_or_new(axes)
  for index, (points, values, label) in enumerate(drawn):
    style = {"markersize": 4, **series_style(index)}
    axes.plot(points, values, label=label, **style)
    rug = {"color": style["color"], "linestyle": "", "marker": "|", "markersize": 7}
    height = np.full_like(points, 0.02 + 0.05 * index)
    axes.plot(points, height, transform=axes.get_xaxis_transform(), **rug)
  axes.margins(y=0.15)
  axes.set(xlabel="position on the line", ylabel="potential")
  axes.legend()
  return titled(axes, title)


def plot_dual(
  dual: ArrayLike,
  predictions: Mapping[str, ArrayLike],
  axes: Axes | None = None,
  title: str | None = None,
) -> Axes:
  """Draws predictions of a dual against it, and how much of it they explain.

  All are centred over the last axis first, since a dual is defined up to a constant.

  Args:
    dual: query-side duals `[..., n]`, in units of logits, without absent points.
    predictions: of the same shape, by name.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes; the diagonal is a perfect prediction, and R2 the share of the variance
    that is predicted.

  Raises:
    ValueError: if there are no predictions, or shapes differ.
  """
  if not predictions:
    raise ValueError("predictions is empty: expected at least one")
  target = array_of("dual", dual, "[..., n]", range(1, 9))
  found = {
    name: _centred(array_like(name, given, "dual", target))
    for name, given in predictions.items()
  }
  target = _centred(target)
  axes = axes_or_new(axes, 4.6, 3.6)
  extent = np.array([target.min(), target.max()])
  axes.plot(extent, extent, color="grey", linewidth=1.0, zorder=0)
  power = (target**2).sum()
  for index, (name, prediction) in enumerate(found.items()):
    r2 = 1.0 - ((prediction - target) ** 2).sum() / power if power else np.nan
    style = series_style(index) | {"linestyle": "", "markersize": 3, "alpha": 0.6}
    label = f"{name}: $R^2$ = {r2:.3f}"
    axes.plot(target.ravel(), prediction.ravel(), label=label, **style)
  axes.set(xlabel="dual, centred", ylabel="prediction, centred")
  axes.legend()
  return titled(axes, title)


def plot_clouds(
  clouds: Mapping[str, ArrayLike], axes: Axes | None = None, title: str | None = None
) -> Axes:
  """Draws clouds of points in the plane, or on lines of their own above each other.

  Args:
    clouds: points `[n, 2]`, or all of them `[n]`, by name.
    axes: where to draw; a new figure by default.
    title: above the axes.

  Returns:
    The axes, with equal units both ways in the plane.

  Raises:
    ValueError: if there are no clouds, or they are not such points.
  """
  if not clouds:
    raise ValueError("clouds is empty: expected at least one")
  placed = _placed(clouds)
  axes = axes_or_new(axes, 4.0, 3.6)
  for index, (name, points) in enumerate(placed.items()):
    style = series_style(index) | {"linestyle": "", "markersize": 5}
    axes.plot(*points.T, label=name, zorder=2.0, **style)
  if np.ndim(next(iter(clouds.values()))) == 1:
    axes.set_yticks(range(len(clouds)), list(clouds))
    axes.set(xlabel="position on the line", ylim=(-0.3, len(clouds) - 0.7))
  else:
    axes.set_aspect("equal")
    axes.legend()
  return titled(axes, title)


def plot_coupling(
  x: ArrayLike,
  y: ArrayLike,
  plan: ArrayLike,
  axes: Axes | None = None,
  title: str | None = None,
  *,
  names: tuple[str, str] = ("x", "y"),
) -> Axes:
  """Draws two clouds, and a line wherever the plan sends mass, dark where it is much.

  Args:
    x: points `[n, 2]` in the plane, or `[n]` on a line.
    y: points `[m, 2]` or `[m]`, as x.
    plan: non-negative, `[n, m]`; entries below a fiftieth of the largest are left out.
    axes: where to draw; a new figure by default.
    title: above the axes.
    names: of the clouds.

  Returns:
    The axes.

  Raises:
    ValueError: if shapes do not fit, or no entry of `plan` is positive.
  """
  clouds = dict(zip(names, (x, y), strict=True))
  starts, ends = _placed(clouds).values()
  plan = array_of("plan", plan, "[n, m]", (2,))
  if plan.shape != (len(starts), len(ends)):
    raise ValueError(
      f"plan has shape {plan.shape}: expected [{len(starts)}, {len(ends)}], as points"
    )
  if not plan.max() > 0:
    raise ValueError("plan holds no positive entry: expected at least one")
  share = plan / plan.max()
  rows, columns = np.nonzero(share >= _FAINTEST)
  segments = np.stack([starts[rows], ends[columns]], axis=1)
  axes = plot_clouds(clouds, axes, title)
  style = {"colors": "grey", "alpha": share[rows, columns], "linewidths": 1.0}
  lines = LineCollection(list(segments), zorder=1.0, **style)
  axes.add_collection(lines, autolim=False)
  return axes


def _centred(values: np.ndarray) -> np.ndarray:
  return values - values.mean(-1, keepdims=True)


def _placed(clouds: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
  """Points `[n, 2]`; those on a line at a height of their own."""
  placed: dict[str, np.ndarray] = {}
  dims = {np.ndim(points) for points in clouds.values()}
  for height, (name, points) in enumerate(clouds.items()):
    points = array_of(name, points, "[n, 2], or [n] for all clouds", (1, 2))
    if len(dims) > 1 or points.shape[1:] not in ((), (2,)):
      raise ValueError(
        f"{name} has shape {points.shape}: expected [n, 2], or [n] for all clouds"
      )
    if points.ndim == 1:
      points = np.stack([points, np.full_like(points, height)], axis=-1)
    placed[name] = points
  return placed
