"""Colours, markers and lines of all figures, and figures without pyplot."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Okabe and Ito's colours, in the order in which lines on white are best told apart.
COLOURS = ("black", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p", "d")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))


class SelfShowing(Figure):
  """Figure that notebooks show as an image, with pyplot or without it."""

  def savefig(self, *args: Any, **options: Any) -> None:
    """As matplotlib's; nothing that stands out, such as a title, is cut off."""
    super().savefig(*args, **({"bbox_inches": "tight"} | options))

  def _repr_png_(self) -> bytes:
    image = io.BytesIO()
    self.savefig(image, format="png")
    return image.getvalue()


def subplots(
  rows: int = 1,
  columns: int = 1,
  *,
  width: float = 4.0,
  height: float = 3.2,
  **options: Any,
) -> np.ndarray:
  """Axes of a new figure, which has no part in the state of pyplot.

  Args:
    rows: of panels.
    columns: of panels.
    width: of a panel, inches.
    height: of a panel, inches.
    **options: for `Figure.subplots`, such as `sharey`.

  Returns:
    The axes, `[rows, columns]`; as the last expression of a notebook's cell,
    `axes[0, 0].figure` shows the figure.

  Raises:
    ValueError: if there are no rows or no columns.
  """
  for name, count in (("rows", rows), ("columns", columns)):
    if count < 1:
      raise ValueError(f"{name}={count}: expected at least 1")
  figure = SelfShowing(figsize=(width * columns, height * rows), layout="constrained")
  return figure.subplots(rows, columns, squeeze=False, **options)


def axes_or_new(axes: Axes | None, width: float = 4.0, height: float = 3.2) -> Axes:
  """`axes`, or new ones on a figure of their own."""
  return subplots(width=width, height=height)[0, 0] if axes is None else axes


def series_style(index: int) -> dict[str, Any]:
  """Colour, marker and line of one of several series; the first 156 all differ.

  Markers are hollow in every second round of the colours.

  Args:
    index: of the series, from zero.

  Returns:
    Keyword arguments of `Axes.plot`.
  """
  hollow = (index // len(COLOURS)) % 2
  return {
    "color": COLOURS[index % len(COLOURS)],
    "marker": MARKERS[index % len(MARKERS)],
    "linestyle": LINES[index % 4],
    "markerfacecolor": "white" if hollow else None,
  }


def titled(axes: Axes, title: str | None) -> Axes:
  """Axes with a title, if there is one."""
  if title is not None:
    axes.set_title(title)
  return axes


def array_of(
  name: str, values: ArrayLike, expected: str, dims: Sequence[int]
) -> np.ndarray:
  """Values as a float array.

  Raises:
    ValueError: if the array is empty, or its number of axes is not in `dims`.
  """
  # Whatever the float: bfloat16 cannot be drawn.
  array = np.asarray(values, dtype=np.float64)
  if array.ndim not in dims or not array.size:
    raise ValueError(f"{name} has shape {array.shape}: expected {expected}")
  return array


def array_like(
  name: str, values: ArrayLike, other: str, like: np.ndarray
) -> np.ndarray:
  """Values as a float array of the shape of another.

  Raises:
    ValueError: if the shapes differ.
  """
  array = np.asarray(values, dtype=np.float64)
  if array.shape != like.shape:
    raise ValueError(
      f"{name} has shape {array.shape}: expected {like.shape}, as {other}"
    )
  return array
