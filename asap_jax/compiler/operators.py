"""Attention operators that a compiled layer may hold: pytrees that know themselves.

Each knows its duals, its output, its label in reports, and the function that a model
calls for it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.functions import sinkhorn_attention, softmax_attention
from asap_jax.attention.implementations.dispatch import ClosedPlan
from asap_jax.attention.inputs import Activation, Inputs
from asap_jax.attention.layers import AsapAttention
from asap_jax.c_transform.entropic import Duals, apply_plan, c_transform, closures
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.compiler.sites import bound_arguments
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import valid_pairs
from asap_jax.teacher.sinkhorn import sinkhorn_duals


@runtime_checkable
class Operator(Protocol):
  """An attention operator reduced to its duals."""

  @property
  def label(self) -> str:
    """Name in reports, such as `"asap@2"` or `"sinkhorn@3"`."""

  def duals(self, seen: Activation) -> tuple[Duals, Array | None]:
    """Duals of its plan, and the query-side dual if it predicts one."""

  def values(self, seen: Activation) -> Array:
    """Output of one call in the fastest form, the keys serving as values."""

  def attention_fn(self, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """Function that a model calls, with further arguments bound."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
  """Softmax attention: g = 0, rows exact."""

  label: ClassVar[str] = "softmax"

  def duals(self, seen: Activation) -> tuple[Duals, None]:
    """See `Operator`."""
    logits = seen.logits
    g = jnp.zeros((*logits.shape[:-2], logits.shape[-1]))
    return Duals(c_transform(logits, g, *seen.masks, to="query"), g), None

  def values(self, seen: Activation) -> Array:
    """See `Operator`."""
    pairs = valid_pairs(*seen.masks)
    return jax.nn.softmax(seen.logits, axis=-1, where=pairs) @ seen.key

  def attention_fn(self, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """See `Operator`."""
    return functools.partial(softmax_attention, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sinkhorn:
  """Sinkhorn stopped after some iterations.

  Attributes:
    iterations: full iterations (static).
    implementation: `"ott"` is the teacher as it was trained; others are the same plan
      and differ in the time they take (static).
  """

  iterations: int = dataclasses.field(metadata={"static": True})
  implementation: Any = dataclasses.field(default="xla", metadata={"static": True})

  @property
  def label(self) -> str:
    """See `Operator`."""
    ott = self.implementation == "ott"
    return "teacher" if ott else f"sinkhorn@{self.iterations}"

  def duals(self, seen: Activation) -> tuple[Duals, None]:
    """See `Operator`."""
    start = jnp.zeros(seen.query.shape[:-1], seen.query.dtype)
    return scaled_plan(seen.logits, start, self.iterations, *seen.masks).duals, None

  def values(self, seen: Activation) -> Array:
    """See `Operator`."""
    if self.implementation == "ott":
      logits, masks = seen.logits, seen.masks
      duals = sinkhorn_duals(logits, self.iterations, *masks)
      return apply_plan(logits, duals, seen.key, *masks)
    start = jnp.zeros(seen.query.shape[:-1], seen.query.dtype)
    return ClosedPlan(
      _inputs(seen), start, self.iterations, None, self.implementation
    ).apply(seen.key, None)

  def attention_fn(self, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """See `Operator`."""
    own = {"iterations": self.iterations, "implementation": self.implementation}
    return functools.partial(sinkhorn_attention, **own, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asap:
  """A dual map and its closures.

  Attributes:
    dual_map: of all heads.
  """

  dual_map: DualMap

  @property
  def label(self) -> str:
    """See `Operator`."""
    closures = self.dual_map.closures
    return "asap" if closures == 1 else f"asap@{closures}"

  def duals(self, seen: Activation) -> tuple[Duals, Array]:
    """See `Operator`."""
    f, count, relaxation = self._predicted(seen)
    return closures(seen.logits, f, count, *seen.masks, relaxation=relaxation), f

  def values(self, seen: Activation) -> Array:
    """See `Operator`."""
    closed = ClosedPlan(_inputs(seen), *self._predicted(seen), None, self.dual_map)
    return closed.apply(seen.key, None)

  def attention_fn(self, options: dict[str, Any]) -> Callable[..., jax.Array]:
    """See `Operator`."""
    return AsapAttention(self.dual_map, options)

  def _predicted(self, seen: Activation) -> tuple[Array, int, Array | None]:
    f = predict_dual(self.dual_map, seen.query, seen.key, *seen.masks)
    return f, self.dual_map.closures, self.dual_map.relaxation


def operator_of(attention_fn: Callable[..., jax.Array]) -> Operator:
  """The operator of one of this package's attention functions, bound or compiled.

  Raises:
    ValueError: for any other function.
  """
  if isinstance(attention_fn, AsapAttention):
    return Asap(attention_fn.dual_map)
  bound = bound_arguments(attention_fn, sinkhorn_attention)
  if bound is not None:
    return Sinkhorn(bound["iterations"], bound["implementation"])
  if bound_arguments(attention_fn, softmax_attention) is not None:
    return Softmax()
  raise ValueError(
    f"attention_fn={attention_fn!r}: expected an AsapAttention, or sinkhorn_attention "
    "or softmax_attention or a partial of them"
  )


def _inputs(seen: Activation) -> Inputs:
  """A call that saw this, with the keys as values."""
  fields = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
  return Inputs(**fields, value=seen.key, unscaled=seen.query)
