"""Watching softmax attention beside the doubly stochastic one that is to replace it."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax import metrics
from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.signature import inputs_of
from asap_jax.c_transform.entropic import plan
from asap_jax.compiler.batches import check_batch
from asap_jax.compiler.operators import Softmax, operator_of
from asap_jax.compiler.recorder import flatten_batch
from asap_jax.compiler.refitting import Moments, moments_of
from asap_jax.compiler.sites import Place, held_in, replace_held

_SIGNATURE = inspect.signature(sinkhorn_attention)


class _Sums(nnx.Variable):
  """What was summed over the calls of one forward pass."""


class Found(NamedTuple):
  """Sums over the valid rows and columns of a layer's plans, and over its outputs.

  A scan stacks them, as it does the layers.

  Attributes:
    tv: from softmax's plan to the other, `[heads]`.
    rows: of how many, `[heads]`.
    before: column error of softmax, `[heads]`.
    after: of the doubly stochastic plan, `[heads]`.
    columns: of how many, `[heads]`.
    moments: of both outputs.
    refused: elements of the batch whose mask is no outer product.
    one_sided: calls that leave padding out of the keys alone.
    one_query: calls with a single query.
  """

  tv: Any
  rows: Any
  before: Any
  after: Any
  columns: Any
  moments: Moments
  refused: Any
  one_sided: Any
  one_query: Any


_ONE_QUERY = Found(
  *(5 * (0.0,)), moments=Moments(*(6 * (0.0,))), refused=0, one_sided=0, one_query=1.0
)


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

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """Outputs of softmax."""
    out = self.held(*args, **kwargs)
    found = self._compare(out, *args, **kwargs)
    earlier = self.sums.get_value() if hasattr(self, "sums") else None
    both = found if earlier is None else jax.tree.map(jnp.add, earlier, found)
    self.sums = _Sums(both)
    return out

  def _compare(self, out: jax.Array, *args: Any, **kwargs: Any) -> Found:
    # Nothing is sown twice.
    kwargs = {name: value for name, value in kwargs.items() if name != "module"}
    bound = getattr(self.function, "keywords", None) or self.function.bound  # type: ignore[attr-defined]
    try:
      call = _SIGNATURE.bind(*args, **(bound | kwargs))
      call.apply_defaults()
      if call.arguments["query"].shape[-3] == 1:
        return _ONE_QUERY
      seen = flatten_batch(inputs_of(call.arguments))
      other_out = self.function(*args, **kwargs)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{self.name}: {error}; leave= passes over the layer") from error
    logits, masks = seen.logits, seen.masks
    softmax, other = (
      plan(logits, each.duals(seen)[0], *masks)
      for each in (Softmax(), operator_of(self.function))
    )
    rows, columns = (jnp.ones((), bool) if mask is None else mask for mask in masks)
    batch, _, n, m = logits.shape

    def total(values: jax.Array, keep: jax.Array) -> jax.Array:
      return jnp.where(keep, values, 0.0).sum((0, 2))

    # Softmax has outputs at padding, where they mean nothing.
    valid = jnp.broadcast_to(rows, (batch, out.shape[-2], n)).swapaxes(1, 2)
    flat = [x.reshape(batch, *x.shape[-3:]) for x in (other_out, out)]
    is_product = jnp.ones((), bool) if seen.is_product is None else seen.is_product
    padded = n == m > 1 and masks[1] is not None
    return Found(
      tv=total(metrics.total_variation(other, softmax), rows),
      rows=total(jnp.ones_like(logits[..., 0]), rows),
      before=total(metrics.column_error(softmax, *masks), columns),
      after=total(metrics.column_error(other, *masks), columns),
      columns=total(jnp.ones_like(logits[..., 0, :]), columns),
      moments=moments_of(flat[0], flat[1], valid),
      refused=(~is_product).sum(),
      one_sided=jnp.asarray(padded) & rows.all() & ~columns.all(),
      one_query=0.0,
    )


def watch(
  model: nnx.Module,
  compared: Mapping[Place, Compared],
  groups: Sequence[Sequence[Any]],
  call: Callable[[nnx.Module, Any], Any],
) -> list[list[Found | None]]:
  """What every layer of a softmax model sees on each of some groups of batches.

  Args:
    model: with softmax attention; it runs in evaluation mode and is not changed.
    compared: what stands meanwhile in the place of each layer.
    groups: of batches; a group may be empty.
    call: how a batch is given to a model.

  Returns:
    Sums in float64 of each group, of every layer in order; `None` for those that were
    not called.

  Raises:
    ValueError: if a layer cannot be doubly stochastic with its mask or arguments.
  """
  places = list(compared)

  def look(running: nnx.Module, batch: Any) -> list[Any]:
    call(running, batch)
    held = [held_in(running, place) for place in places]
    return [each.sums.get_value() if hasattr(each, "sums") else None for each in held]

  record = run_of(replace_held(model, compared), look)

  def sums_of(batches: Sequence[Any]) -> list[Any]:
    sums: list[Any] = [None] * len(places)
    for index, batch in enumerate(batches):
      check_batch(batch)
      found = jax.tree.map(lambda x: np.asarray(x, np.float64), record(batch))
      sums = jax.tree.map(np.add, sums, found) if index else found
    return sums

  return [sums_of(batches) for batches in groups]


def run_of(
  model: nnx.Module, call: Callable[[nnx.Module, Any], Any]
) -> Callable[[Any], Any]:
  """A jitted function of a batch, in evaluation mode; `model` is not changed."""
  running = nnx.clone(model)
  running.eval()
  graph, state = nnx.split(running)
  run = jax.jit(lambda state, batch: call(nnx.merge(graph, state), batch))
  return functools.partial(run, state)


def stays_softmax(name: str, found: Found | None) -> bool:
  """Whether a layer cannot but stay softmax: it has one query.

  Raises:
    ValueError: if its mask is no outer product of valid queries and valid keys.
  """
  if found is None or np.any(found.one_query):
    return found is not None
  if np.any(found.refused):
    raise ValueError(
      f"{name}: its mask is not the outer product of valid queries and valid keys (a "
      "causal one is not), so that it has no doubly stochastic plan; expected "
      "nnx.make_attention_mask(valid, valid), or the name in leave="
    )
  if np.any(found.one_sided):
    warnings.warn(
      f"{name}: its mask leaves padding out of the keys but not out of the queries, "
      "which would take a share of every key; pass nnx.make_attention_mask(valid, "
      "valid)",
      stacklevel=3,
    )
  return False
