"""Attention operators that a compiled layer may hold: pytrees that know themselves.

Each knows its label in reports, its duals, and the function that a model calls for it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from asap_jax.attention.functions import (
  asap_attention,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.attention.inputs import Activation
from asap_jax.attention.layers import AsapAttention
from asap_jax.c_transform.entropic import Duals, c_transform, closure, closures
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.teacher.sinkhorn import sinkhorn_source_dual
from asap_jax.teacher.starts import Start, starting_dual


@runtime_checkable
class Operator(Protocol):
  """An attention operator."""

  @property
  def label(self) -> str:
    """Name in reports, such as `"asap@2"` or `"sinkhorn@3"`."""

  def duals(self, seen: Activation) -> tuple[Duals, Array | None]:
    """Duals of its plan, and the query-side dual if it predicts such a one."""

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
  """Sinkhorn stopped after some iterations: a teacher, or a teacher cut short.

  Attributes:
    iterations: full iterations (static, as all others).
    implementation: see `asap_jax.sinkhorn_attention`; all are the same plan and differ
      in the time they take.
    start: of the iterations; see `asap_jax.sinkhorn_attention`.
    relaxation: likewise.
    tolerance: likewise.
  """

  iterations: int = dataclasses.field(metadata={"static": True})
  implementation: str | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  start: Start = dataclasses.field(default="zero", metadata={"static": True})
  relaxation: float = dataclasses.field(default=1.0, metadata={"static": True})
  tolerance: float | None = dataclasses.field(default=None, metadata={"static": True})

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
    if self.iterations == 0:
      tokens = seen.query, seen.key, *seen.masks
      g = starting_dual(self.start, *tokens, side="key")
      return closures(seen.logits, g, 0, *seen.masks, side="key"), None
    return closure(seen.logits, self.source(seen), *seen.masks), None

  def source(self, seen: Activation) -> Float[Array, "*batch heads n"]:
    """The query-side dual that the last iteration consumes.

    Closing it gives back the plan of all iterations: the target of calibration.
    """
    start = starting_dual(self.start, seen.query, seen.key, *seen.masks)
    arguments = seen.logits, self.iterations, *seen.masks, start
    options: dict[str, Any] = {"relaxation": self.relaxation}
    return sinkhorn_source_dual(*arguments, tolerance=self.tolerance, **options)


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

  def duals(self, seen: Activation) -> tuple[Duals, Array | None]:
    """See `Operator`."""
    dual_map, masks = self.dual_map, seen.masks
    predicted = predict_dual(dual_map, seen.query, seen.key, *masks)
    closed = closures(
      seen.logits, predicted, dual_map.closures, *masks, **dual_map.steps
    )
    return closed, predicted if dual_map.side == "query" else None


def operator_of(attention_fn: Callable[..., jax.Array]) -> Operator:
  """The operator of one of this package's attention functions, bound or compiled.

  Raises:
    ValueError: for any other function.
  """
  if isinstance(attention_fn, AsapAttention):
    return Asap(attention_fn.dual_map)
  bound = bound_arguments(attention_fn, sinkhorn_attention)
  if bound is not None:
    return sinkhorn_of(bound)
  if bound_arguments(attention_fn, softmax_attention) is not None:
    return Softmax()
  raise ValueError(
    f"attention_fn={attention_fn!r}: expected an AsapAttention, or sinkhorn_attention "
    "or softmax_attention or a partial of them"
  )


def sinkhorn_of(bound: dict[str, Any]) -> Sinkhorn:
  """The operator of bound arguments, which are taken out of them."""
  return Sinkhorn(**{name: bound.pop(name) for name in OWN})


def bound_arguments(
  held: Any, function: Callable[..., jax.Array]
) -> dict[str, Any] | None:
  """Keyword arguments bound to `function`; `None` if `held` is no partial of it.

  A function under `jax.jit` counts as itself. Of `sinkhorn_attention`, the defaults of
  its own options count as bound. Numbers in arrays without axes count as numbers.
  """
  bound: dict[str, Any] = {}
  while held is not function:
    if isinstance(held, functools.partial) and not held.args:
      held, bound = held.func, held.keywords | bound
    elif isinstance(held, _Jitted):
      held = held.__wrapped__  # type: ignore[attr-defined]
    else:
      return None
  defaults = _DEFAULTS if function is sinkhorn_attention else {}
  return defaults | {name: _plain(value) for name, value in bound.items()}


def _plain(value: Any) -> Any:
  """A number that lies in an array, as what it is: hashable."""
  is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
  if not is_array or isinstance(value, jax.core.Tracer) or value.ndim > 0:
    return value
  return value.item()


_Jitted = type(jax.jit(lambda: None))
OWN = tuple(field.name for field in dataclasses.fields(Sinkhorn))
_DEFAULTS = {
  name: inspect.signature(sinkhorn_attention).parameters[name].default for name in OWN
}
