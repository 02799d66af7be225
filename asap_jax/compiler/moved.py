"""Report of how far doubly stochastic attention moves a softmax model."""

import dataclasses
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from asap_jax.compiler.comparing import Found
from asap_jax.compiler.refitting import distance

# Of one layer: W and what is added, or `None`.
Affine = tuple[np.ndarray, np.ndarray] | None


@dataclasses.dataclass(frozen=True)
class LayerMoved:
  """How far one layer moved, on the queries, keys and values of the softmax model.

  Attributes:
    name: path of the attention function in the model; `[i]` in a stack of layers.
    tv: total variation from the softmax plan to the doubly stochastic one, 0 to 1,
      `[heads]`, mean over valid rows; NaN where nothing was measured.
    softmax_column_error: mean |column sum / target - 1| of softmax, `[heads]`.
    column_error: the same afterwards.
    output: distance of what leaves the heads, after the refit where there is one,
      relative to the norm of softmax's.
  """

  name: str
  tv: np.ndarray
  softmax_column_error: np.ndarray
  column_error: np.ndarray
  output: float


@dataclasses.dataclass(frozen=True)
class Moved:
  """Layers of a converted model, and how far its outputs moved; prints as a table.

  Attributes:
    layers: that were converted, in the model's order.
    kept: names of layers that stay softmax, for they have one query.
    cosine: of the model's outputs to those before, along their last axis, mean over the
      rest; NaN where nothing was measured.
    output: distance of the model's outputs, relative to their norm before.
  """

  layers: tuple[LayerMoved, ...]
  kept: tuple[str, ...] = ()
  cosine: float = float("nan")
  output: float = float("nan")

  def __str__(self) -> str:
    table = Table()
    table.add_column("layer", no_wrap=True)
    for name in ("TV", "column error before", "after", "outputs moved"):
      table.add_column(name, justify="right")
    for layer in self.layers:
      figures = (layer.tv, layer.softmax_column_error, layer.column_error, layer.output)
      shown = ("-" if np.isnan(x).any() else f"{np.mean(x):.3f}" for x in figures)
      table.add_row(layer.name, *shown)
    stream = io.StringIO()
    # In a notebook rich would display the table instead of writing it.
    console = Console(
      file=stream, width=100, force_jupyter=False, force_terminal=False, markup=False
    )
    console.print(table)
    lines = [f"{name}: stays softmax, for it has one query." for name in self.kept]
    if not np.isnan(self.cosine):
      lines.append(
        f"The model's outputs: cosine {self.cosine:.3f} to those before, moved by "
        f"{self.output:.3f} of their norm."
      )
    for line in lines:
      console.print(line, highlight=False)
    return stream.getvalue().rstrip("\n")


def layers_moved(
  name: str, found: Found | None, affine: Affine = None
) -> list[LayerMoved]:
  """One layer, or those that a scan stacks in one place.

  Args:
    name: of the place.
    found: there; `None` where it was not called.
    affine: that was folded into what follows, stacked likewise.
  """
  if found is None:
    nothing = np.full((1,), np.nan)
    return [LayerMoved(name, nothing, nothing, nothing, float("nan"))]
  if found.rows.ndim == 1:
    return [_layer(name, found, affine)]
  take = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
  return [
    _layer(f"{name}[{i}]", take(found, i), None if affine is None else take(affine, i))
    for i in range(len(found.rows))
  ]


def _layer(name: str, found: Found, affine: Affine) -> LayerMoved:
  return LayerMoved(
    name,
    found.tv / found.rows,
    found.before / found.columns,
    found.after / found.columns,
    distance(found.moments, affine),
  )


def outputs_moved(
  runs: Sequence[Callable[[Any], Any]], batches: Iterable[Any]
) -> tuple[float, float]:
  """Mean cosine of two models' outputs, along their last axis, and relative distance.

  Args:
    runs: before and after, functions of a batch.
    batches: to run on.
  """
  cosines, sums = [], np.zeros(2)
  for batch in batches:
    for old, new in zip(*(_floating(run(batch)) for run in runs), strict=True):
      norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
      cosines.append(((old * new).sum(-1) / np.where(norms > 0, norms, 1)).ravel())
      sums += ((new - old) ** 2).sum(), (old**2).sum()
  if not cosines:
    return float("nan"), float("nan")
  return float(np.concatenate(cosines).mean()), float(np.sqrt(sums[0] / sums[1]))


def _floating(outputs: Any) -> list[np.ndarray]:
  leaves = map(jnp.atleast_1d, jax.tree.leaves(outputs))
  return [
    np.asarray(leaf, np.float64)
    for leaf in leaves
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
