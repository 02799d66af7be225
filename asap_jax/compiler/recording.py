"""Recording of the calls that each of a teacher's Sinkhorn layers sees on batches."""

import operator
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import track

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.sites import Site, find_sinkhorn, recorder

Calls = list[tuple[Activation, ...]]  # of each layer
Stream = Generator[Calls, None, None]


def is_held_out(index: int) -> bool:
  """Tells whether a batch, counted from zero, is kept to measure on: every fifth."""
  return index % 5 == 1  # not the first, which is there whenever any batch is


class Layer(NamedTuple):
  """Sinkhorn attention, or one of several that `nnx.scan` runs through one site.

  Attributes:
    site: where the model holds it.
    index: position in the scan's stack, `None` if there is no scan.
    heads: number of heads.
    dim: head dimension.
  """

  site: Site
  index: int | None  # type: ignore[assignment]  # also a method of tuples
  heads: int
  dim: int

  @property
  def name(self) -> str:
    """Name of the site, with the position in a stack."""
    return self.site.name + ("" if self.index is None else f"[{self.index}]")


class Observer:
  """Frozen teacher and its calibration batches.

  Args:
    model: the teacher, left untouched.
    batches: its inputs; every fifth, from the second on, is held out. Each stream
      iterates over them again; an iterator that can be read only once is stored.
    call: how a batch is given to the model.
    progress: whether streams show a progress bar.

  Attributes:
    batches: as given, or stored.
    sites: of the model's Sinkhorn attentions.
    layers: at those sites, in the model's order.
    progress: as given.

  Raises:
    ValueError: if there is nothing to observe: no Sinkhorn attention, no batch, or
      attention that is not called or not visible.
  """

  def __init__(
    self,
    model: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[nnx.Module, Any], Any],
    progress: bool,
  ):
    self.sites = find_sinkhorn(model)
    if not self.sites:
      raise ValueError(
        "model holds no Sinkhorn attention: expected a module with an attribute that "
        "is sinkhorn_attention or functools.partial(sinkhorn_attention, ...)"
      )
    self.batches = list(batches) if iter(batches) is batches else batches
    self._record = recorder(model, self.sites, call)
    self.progress = progress
    first = next(iter(self.batches), None)
    if first is None:
      raise ValueError("batches is empty: expected at least two batches")
    self.layers = _layers(self.sites, _shapes_seen(self._record, first))

  def activations(self, description: str, *, held_out: bool = False) -> Stream:
    """Calls of every layer, batch by batch, of the batches fitted or held out.

    Raises:
      ValueError: if activations are not finite, or a mask is not the outer product of
        valid queries and valid keys.
    """
    batches = track(self.batches, description, disable=not self.progress)
    for index, batch in enumerate(batches):
      if is_held_out(index) == held_out:
        calls = _unstack(self._record(batch))
        _check_calls(self.layers, calls)
        yield calls

  def sample(self, sequences: int) -> tuple[list[Calls], list[Calls]]:
    """Calls of every layer on the first batches: fitted, and held out.

    Batches are read until both hold so many sequences, the latter half as many, or
    there are no more.

    Raises:
      ValueError: as `activations`, and if no batch is held out.
    """
    wanted = {False: sequences, True: sequences // 2}
    kept: dict[bool, list[Calls]] = {False: [], True: []}
    for index, batch in enumerate(self.batches):
      held_out = is_held_out(index)
      if wanted[held_out] <= 0:
        if max(wanted.values()) <= 0:
          break
        continue
      calls = _unstack(self._record(batch))
      _check_calls(self.layers, calls)
      kept[held_out].append(calls)
      wanted[held_out] -= calls[0][0].query.shape[0]
    if not kept[True]:
      raise ValueError(
        "batches holds a single batch: expected at least two, one of them to measure on"
      )
    return kept[False], kept[True]


def _shapes_seen(record: Callable[[Any], Calls], batch: Any) -> Calls:
  try:
    return jax.eval_shape(record, batch)
  except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
    raise ValueError(
      "the model could not be run with its Sinkhorn attention under observation: "
      f"{error}. If it runs without (try call(model, batch)), the attention sits in a "
      "transformation that shares it, such as nnx.vmap with its axis None; nnx.jit, "
      "nnx.remat and nnx.scan over stacked layers can be compiled"
    ) from error


def _layers(sites: list[Site], seen: Calls) -> list[Layer]:
  layers = []
  for site, calls in zip(sites, seen, strict=True):
    if not calls:
      raise ValueError(
        f"{site.name}: no call of this attention was seen on a calibration batch; pass "
        "call=, or batches that reach it; a model that splits and merges its modules "
        "inside a JAX transformation hides the calls"
      )
    *stack, _, heads, _, dim = calls[0].query.shape
    if len(stack) > 1:
      raise ValueError(
        f"{site.name}: stacked in {len(stack)} nested scans: expected one at most"
      )
    indices = range(stack[0]) if stack else [None]
    layers += [Layer(site, index, heads, dim) for index in indices]
  return layers


def _unstack(calls: Calls) -> Calls:
  """Calls of each layer, taken off the axis that `nnx.scan` stacks its layers on."""
  unstacked = []
  for of_site in calls:
    if of_site[0].query.ndim == 4:
      unstacked.append(of_site)
      continue
    for index in range(len(of_site[0].query)):
      unstacked.append(jax.tree.map(operator.itemgetter(index), of_site))
  return unstacked


def _check_calls(layers: list[Layer], calls: Calls) -> None:
  for layer, of_layer in zip(layers, calls, strict=True):
    for activation in of_layer:
      if not _is_finite(activation):
        raise ValueError(
          f"{layer.name}: queries, keys or bias are not finite on a calibration batch: "
          "the teacher overflows there"
        )
      if activation.is_product is not None and not activation.is_product:
        raise ValueError(
          f"{layer.name}: its mask is not the outer product of valid queries and valid "
          "keys, so its plan is not doubly stochastic; expected "
          "nnx.make_attention_mask(query_valid, key_valid)"
        )


@jax.jit
def _is_finite(activation: Activation) -> jax.Array:
  parts = jax.tree.leaves((activation.query, activation.key, activation.bias))
  return jnp.array([jnp.isfinite(part).all() for part in parts]).all()
