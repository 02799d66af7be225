"""Attention operators that a compiled layer may hold: pytrees that know themselves.

Each knows its label in reports, its duals, and the function that a model calls for it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.functions import (
  asap_attention,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.attention.inputs import Activation
from asap_jax.attention.layers import AsapAttention
from asap_jax.c_transform.entropic import Duals, c_transform, closures
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.compiler.sites import bound_arguments
from asap_jax.dual_map.predict import DualMap, predict_dual


@runtime_checkable
class Operator(Protocol):
  """An attention operator."""

  @property
  def label(self) -> str:
    """Name in reports, such as `"asap@2"` or `"sinkhorn@3"`."""

  def duals(self, seen: Activation) -> tuple[Duals, Array | None]:
    """Duals of its plan, and the query-side dual if it predicts one."""

  @property
  def attention_fn(self) -> Callable[..., jax.Array]:
    """Attention function with the operator's own arguments bound."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
  """Softmax attention: g = 0, rows exact."""

  label: ClassVar[str] = "softmax"
  attention_fn: ClassVar[Callable[..., jax.Array]] = staticmethod(softmax_attention)

  def duals(self, seen: Activation) -> tuple[Duals, None]:
    """See `Operator`."""
    logits = seen.logits
    g = jnp.zeros((*logits.shape[:-2], logits.shape[-1]))
    return Duals(c_transform(logits, g, *seen.masks, to="query"), g), None


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
  implementation: str = dataclasses.field(default="xla", metadata={"static": True})

  @property
  def label(self) -> str:
    """See `Operator`."""
    ott = self.implementation == "ott"
    return "teacher" if ott else f"sinkhorn@{self.iterations}"

  @property
  def attention_fn(self) -> Callable[..., jax.Array]:
    """See `Operator`."""
    return functools.partial(sinkhorn_attention, **dataclasses.asdict(self))

  def duals(self, seen: Activation) -> tuple[Duals, None]:
    """See `Operator`."""
    start = jnp.zeros(seen.query.shape[:-1], seen.query.dtype)
    return scaled_plan(seen.logits, start, self.iterations, *seen.masks).duals, None


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
    count = self.dual_map.closures
    return "asap" if count == 1 else f"asap@{count}"

  @property
  def attention_fn(self) -> Callable[..., jax.Array]:
    """See `Operator`."""
    return functools.partial(asap_attention, dual_map=self.dual_map)

  def duals(self, seen: Activation) -> tuple[Duals, Array]:
    """See `Operator`."""
    f = predict_dual(self.dual_map, seen.query, seen.key, *seen.masks)
    count, relaxation = self.dual_map.closures, self.dual_map.relaxation
    return closures(seen.logits, f, count, *seen.masks, relaxation=relaxation), f


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
