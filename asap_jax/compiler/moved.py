"""How far doubly stochastic attention moves a softmax model, before any training."""

import dataclasses
import functools
import inspect
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from asap_jax import metrics
from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.signature import inputs_of
from asap_jax.c_transform.entropic import plan
from asap_jax.compiler.batches import check_batch
from asap_jax.compiler.operators import Softmax, operator_of
from asap_jax.compiler.recorder import flatten_batch
from asap_jax.compiler.sites import Place, held_in, replace_held

_SIGNATURE = inspect.signature(sinkhorn_attention)


@dataclasses.dataclass(frozen=True)
class LayerMoved:
  """How far one layer moved, on the queries, keys and values of the softmax model.

  Attributes:
    name: path of the attention function in the model; `[i]` in a stack of layers.
    tv: total variation from the softmax plan to the doubly stochastic one, 0 to 1,
      `[heads]`, mean over valid rows; NaN where nothing was measured.
    softmax_column_error: mean |column sum / target - 1| of softmax, `[heads]`.
    column_error: the same afterwards.
    output: distance of the attention's outputs, relative to the norm of softmax's.
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
      table.add_row(layer.name, *(f"{np.mean(each):.3f}" for each in figures))
    stream = io.StringIO()
    # In a notebook rich would display the table instead of writing it.
    console = Console(
      file=stream, width=100, force_jupyter=False, force_terminal=False, markup=False
    )
    console.print(table)
    if not np.isnan(self.cosine):
      console.print(
        f"The model's outputs: cosine {self.cosine:.3f} to those before, moved by "
        f"{self.output:.3f} of their norm.",
        highlight=False,
      )
    for name in self.kept:
      console.print(f"{name}: stays softmax, for it has one query.", highlight=False)
    return stream.getvalue().rstrip("\n")


class _Sums(nnx.Variable):
  """What was summed over the calls of one forward pass."""


class Found(NamedTuple):
  """Sums over the valid rows and columns of a layer's plans, and over its outputs.

  Attributes:
    tv: `[heads]`.
    rows: of how many, `[heads]`.
    before: column error of softmax, `[heads]`.
    after: of the doubly stochastic plan.
    columns: of how many.
    difference: squared, of the outputs.
    norm: squared, of softmax's outputs.
    refused: 1 where a mask is no outer product.
    one_sided: 1 where padding is left out of the keys alone.
    one_query: 1 where there is a single query.
  """

  tv: Any
  rows: Any
  before: Any
  after: Any
  columns: Any
  difference: Any
  norm: Any
  refused: Any
  one_sided: Any
  one_query: Any


class Compared(nnx.Module):
  """Softmax attention that also computes what would come out of another function.

  Args:
    name: of the layer.
    held: softmax attention.
    function: the other one, `sinkhorn_attention` or a dual map's.
  """

  sums: _Sums

  def __init__(
    self,
    name: str,
    held: Callable[..., jax.Array],
    function: Callable[..., jax.Array],
  ):
    self.name, self.held, self.function = name, held, function
    if isinstance(held, functools.partial):
      self.bound = nnx.static(dict(held.keywords))
    else:
      self.bound = nnx.static({})

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """Outputs of softmax."""
    out = self.held(*args, **kwargs)
    given = {k: v for k, v in kwargs.items() if k != "module"}
    found = self._compare(out, *args, **given)
    earlier = self.sums.get_value() if hasattr(self, "sums") else None
    both = found if earlier is None else jax.tree.map(jnp.add, earlier, found)
    self.sums = _Sums(both)
    return out

  def _compare(self, out: jax.Array, *args: Any, **kwargs: Any) -> Found:
    bound = {k: v for k, v in self.bound.items() if k in _SIGNATURE.parameters}
    bound.pop("implementation", None)
    try:
      call = _SIGNATURE.bind(*args, **(bound | kwargs))
      call.apply_defaults()
      call.arguments["deterministic"] = True
      seen = flatten_batch(inputs_of(call.arguments))
    except (TypeError, ValueError) as error:
      raise ValueError(f"{self.name}: {error}. leave= passes over the layer") from error
    logits, masks = seen.logits, seen.masks
    softmax, other = (
      plan(logits, each.duals(seen)[0], *masks)
      for each in (Softmax(), operator_of(self.function))
    )
    other_out = self.function(*args, **kwargs)
    queries, keys = (jnp.ones((), bool) if mask is None else mask for mask in masks)
    n, m = logits.shape[-2:]

    def total(values: jax.Array, keep: jax.Array) -> jax.Array:
      return jnp.where(keep, values, 0.0).sum((0, 2))

    def squared(values: jax.Array) -> jax.Array:
      flat = values.reshape(-1, *values.shape[-3:]).astype(jnp.float32)
      # Softmax has outputs at padding, where they mean nothing.
      valid = jnp.broadcast_to(queries, (*logits.shape[:2], n)).swapaxes(1, 2)
      return jnp.where(valid[..., None], flat**2, 0.0).sum()

    rows = jnp.ones_like(logits[..., 0])
    columns = jnp.ones_like(logits[..., 0, :])
    lacks = masks[1] is not None and n == m > 1
    return Found(
      tv=total(metrics.total_variation(other, softmax), queries),
      rows=total(rows, queries),
      before=total(metrics.column_error(softmax, *masks), keys),
      after=total(metrics.column_error(other, *masks), keys),
      columns=total(columns, keys),
      difference=squared(other_out - out),
      norm=squared(out),
      refused=0 if seen.is_product is None else (~seen.is_product).astype(int),
      one_sided=(queries.all() & ~keys.all()).astype(int) if lacks else 0,
      one_query=int(n == 1),
    )


def how_far(
  model: nnx.Module,
  compared: Mapping[Place, Compared],
  convert: Callable[[Collection[str]], nnx.Module],
  batches: Iterable[Any],
  call: Callable[[nnx.Module, Any], Any],
) -> Moved:
  """How far the layers of a model and its outputs move on batches.

  Args:
    model: with softmax attention.
    compared: what is to stand for a forward pass in the place of each layer.
    convert: makes the model with some layers converted, by name.
    batches: to measure on, or none.
    call: how a batch is given to a model.

  Raises:
    ValueError: if a mask is no outer product of valid queries and valid keys.
  """
  names = [each.name for each in compared.values()]
  places = list(compared)

  def look(running: nnx.Module, batch: Any) -> list[Found | None]:
    call(running, batch)
    return [getattr(held_in(running, p), "sums", None) for p in places]

  record = _jitted(replace_held(model, compared), look)
  sums: list[Any] | None = None
  stored = []
  for batch in batches:
    check_batch(batch)
    stored.append(batch)
    found = jax.device_get(record(batch))
    sums = found if sums is None else jax.tree.map(np.add, sums, found)
  if sums is None:
    return Moved(tuple(map(_unmeasured, names)))
  by_name = dict(zip(names, sums, strict=True))
  kept = _checked(by_name)
  layers = [
    layer
    for name, each in by_name.items()
    if name not in kept
    for layer in _layers(name, each)
  ]
  runs = [
    _jitted(each, call) for each in (model, convert([n for n in names if n not in kept]))
  ]
  cosine, output = _outputs(runs, stored)
  return Moved(tuple(layers), tuple(kept), cosine, output)


def _jitted(
  model: nnx.Module, call: Callable[[nnx.Module, Any], Any]
) -> Callable[[Any], Any]:
  """A function of a batch, in evaluation mode; `model` is not changed."""
  running = nnx.clone(model)
  running.eval()
  graph, state = nnx.split(running)
  run = jax.jit(lambda state, batch: call(nnx.merge(graph, state), batch))
  return functools.partial(run, state)


def _checked(found: Mapping[str, Found | None]) -> list[str]:
  """Names of layers that stay softmax.

  Raises:
    ValueError: if a mask is no outer product of valid queries and valid keys.
  """
  kept = []
  for name, each in found.items():
    if each is None:
      continue
    if np.any(each.one_query):
      kept.append(name)
    elif np.any(each.refused):
      raise ValueError(
        f"{name}: its mask is not the outer product of valid queries and valid keys (a "
        "causal one is not), so that it has no doubly stochastic plan; expected "
        "nnx.make_attention_mask(valid, valid), or the name in leave="
      )
    elif np.any(each.one_sided):
      warnings.warn(
        f"{name}: its mask leaves padding out of the keys, but not of the queries, "
        "which would take a share of every key; pass nnx.make_attention_mask(valid, "
        "valid)",
        stacklevel=4,
      )
  return kept


def _layers(name: str, found: Found | None) -> list[LayerMoved]:
  """One layer, or those that a scan stacks in one place."""
  if found is None:
    return [_unmeasured(name)]
  found = Found(*(np.asarray(each, np.float64) for each in found))
  if found.rows.ndim == 1:
    return [_layer(name, found)]
  return [
    _layer(f"{name}[{i}]", Found(*(each[i] for each in found)))
    for i in range(len(found.rows))
  ]


def _layer(name: str, found: Found) -> LayerMoved:
  return LayerMoved(
    name,
    found.tv / found.rows,
    found.before / found.columns,
    found.after / found.columns,
    float(np.sqrt(found.difference / found.norm)),
  )


def _unmeasured(name: str) -> LayerMoved:
  nothing = np.full((1,), np.nan)
  return LayerMoved(name, nothing, nothing, nothing, float("nan"))


def _outputs(
  runs: Iterable[Callable[[Any], Any]], batches: Iterable[Any]
) -> tuple[float, float]:
  """Mean cosine of two models' outputs, and their relative distance."""
  cosines, sums = [], np.zeros(2)
  for batch in batches:
    before, after = (
      [
        np.asarray(leaf, np.float64)
        for leaf in jax.tree.leaves(run(batch))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
      ]
      for run in runs
    )
    for old, new in zip(before, after, strict=True):
      norms = np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
      cosines.append(((old * new).sum(-1) / np.where(norms > 0, norms, 1)).ravel())
      sums += ((new - old) ** 2).sum(), (old**2).sum()
  if not cosines:
    return float("nan"), float("nan")
  return float(np.concatenate(cosines).mean()), float(np.sqrt(sums[0] / sums[1]))
