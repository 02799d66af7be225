"""Measurements against the length of a sequence."""

import math
import warnings
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from asap_jax.plotting.style import LINES, axes_or_new, series_style, titled


def plot_scaling(
  series: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
  axes: Axes | None = None,
  ylabel: str = "ms",
  title: str | None = None,
) -> Axes:
  """Draws measurements against the length of a sequence, both on logarithmic scales.

  A family has one colour and marker, a variant one style of line, so that both can be
  told apart in print without colour.

  Args:
    series: points `(length, value)` by family and variant; those that are not positive
      and finite are warned about and not drawn.
    axes: where to draw; a new figure by default.
    ylabel: what the values are.
    title: above the axes.

  Returns:
    The axes; without `axes`, `.figure` is the new figure.

  Raises:
    ValueError: if there are no points.
  """
  if not any(series.values()):
    raise ValueError(
      f"series={dict(series)} holds no points: expected one or more with a length and "
      "a value"
    )
  axes = axes_or_new(axes, 7.0, 4.6)
  families, variants = (
    list(dict.fromkeys(names)) for names in zip(*series, strict=True)
  )
  lengths: set[float] = set()
  for (family, variant), given in series.items():
    points = sorted(point for point in given if _on_log_scale(point))
    if len(points) < len(given):
      bad = [point for point in given if not _on_log_scale(point)]
      warnings.warn(
        f"{family} {variant}: {bad} are not positive and finite and are not drawn",
        stacklevel=2,
      )
    if not points:
      continue
    lengths.update(length for length, _ in points)
    style = series_style(families.index(family)) | {"markersize": 5}
    style["linestyle"] = LINES[variants.index(variant) % len(LINES)]
    name = f"{family}, {variant}" if variant else family
    axes.plot(*zip(*points, strict=True), label=name, **style)
  axes.set(xscale="log", yscale="log", xlabel="length", ylabel=ylabel)
  axes.set_xticks(sorted(lengths), [f"{length:g}" for length in sorted(lengths)])
  axes.xaxis.minorticks_off()
  axes.grid(alpha=0.3)
  axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
  return titled(axes, title)


def _on_log_scale(point: tuple[float, float]) -> bool:
  return all(math.isfinite(value) and value > 0 for value in point)
