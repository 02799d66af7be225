"""From a short core to the signature that Flax's attention layers call.

A core is `core(call, *, option=...)`: it turns the inputs of a `Call` into a plan and
returns `call.attend(plan)`. `attention_fn` makes of it a function with all arguments of
`asap_jax.softmax_attention`, named one by one (Linen passes on only what it finds in
the signature), and the core's own options after them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.functions import softmax_attention
from asap_jax.attention.inputs import Inputs, attend, prepare, restrict

_COMMON = inspect.signature(softmax_attention)
_UNSUPPORTED = (
  "einsum_dot_general",
  "qk_attn_weights_einsum",
  "attn_weights_value_einsum",
)


@runtime_checkable
class Plan(Protocol):
  """Attention weights that can be applied to values without being formed."""

  def dense(self) -> Array:
    """The weights, `[..., n, m]`, float32."""

  def apply(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    """The weights times values `[..., m, features]`, in the dtype of the values."""


class Call(NamedTuple):
  """One call of an attention function.

  Attributes:
    inputs: with heads in front; absent queries, keys and values are zero in it.
    allowed: pairs that may attend, broadcast to `[..., n, m]`, or `None` for all; set
      where the function takes any mask, while else `inputs` holds valid tokens.
    scale: scale / epsilon, which `inputs.query` carries.
    dropout: arguments of `asap_jax.attention.inputs.attend`.
  """

  inputs: Inputs
  allowed: Array | None
  scale: float
  dropout: dict[str, Any]

  def attend(self, plan: Array | Plan) -> Array:
    """Values weighted by the plan, `[batch..., n, heads, features]`.

    Forms the plan only where dropout or sowing needs it.
    """
    inputs = self.inputs
    if isinstance(plan, jax.Array):
      return attend(inputs, plan, **self.dropout)
    if self.dropout["module"] is not None or self.dropout["dropout_rate"] > 0.0:
      return attend(inputs, plan.dense(), **self.dropout)
    out = plan.apply(inputs.value, inputs.precision)
    if inputs.is_product is not None:
      out = jnp.where(inputs.is_product, out, jnp.nan)
    return jnp.moveaxis(out, -3, -2)


def attention_fn(
  core: Callable[..., Array] | None = None,
  *,
  any_mask: bool = False,
  takes_bias: bool = True,
  parts: int = 1,
) -> Callable[..., Any]:
  """Decorates a core (module docstring).

  Args:
    core: `core(call, *, ...)`.
    any_mask: whether masks other than an outer product of valid tokens, causal ones
      included, make sense.
    takes_bias: whether a bias of the logits does.
    parts: parts that queries and keys are cut into; the default scale is that of one.

  Returns:
    The attention function; without `core`, a decorator.
  """
  if core is None:
    return functools.partial(
      attention_fn, any_mask=any_mask, takes_bias=takes_bias, parts=parts
    )
  own = list(inspect.signature(core).parameters.values())[1:]
  signature = _COMMON.replace(parameters=[*_COMMON.parameters.values(), *own])

  @functools.wraps(core)
  def function(*args: Any, **kwargs: Any) -> Array:
    given = signature.bind(*args, **kwargs)
    options = {p.name: given.arguments[p.name] for p in own if p.name in given.kwargs}
    given.apply_defaults()
    call = _prepare(given.arguments, core.__name__, any_mask, takes_bias, parts)
    return core(call, **options)

  function.__signature__ = signature  # type: ignore[attr-defined]
  return function


def _prepare(
  given: dict[str, Any], name: str, any_mask: bool, takes_bias: bool, parts: int
) -> Call:
  for argument in _UNSUPPORTED:
    if given[argument] is not None:
      raise ValueError(f"{argument}: not supported by {name}; expected None")
  if given["bias"] is not None and not takes_bias:
    raise ValueError(f"bias: {name} has no logits to add it to; expected None")
  dim = given["query"].shape[-1]
  scale = (dim / parts) ** -0.5 if given["scale"] is None else given["scale"]
  inputs = prepare(
    given["query"],
    given["key"],
    given["value"],
    given["bias"],
    given["dtype"],
    given["precision"],
    scale,
    given["epsilon"],
  )
  allowed = None
  if any_mask:
    inputs, allowed = _exclude(inputs, given["mask"], given["is_causal"])
  else:
    inputs = restrict(inputs, given["mask"], given["is_causal"])
  active = not given["deterministic"]
  dropout = {
    "dropout_rng": given["dropout_rng"] if active else None,
    "dropout_rate": given["dropout_rate"] if active else 0.0,
    "broadcast_dropout": given["broadcast_dropout"],
    "module": given["module"],
  }
  return Call(inputs, allowed, scale / given["epsilon"], dropout)


def _exclude(
  inputs: Inputs, mask: Array | None, is_causal: bool
) -> tuple[Inputs, Array | None]:
  """Pairs that may attend, and `inputs` with zeros at tokens that are in none."""
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  allowed = None if mask is None else mask != 0
  if is_causal:
    causal = jnp.tril(jnp.ones((n, m), bool))
    allowed = causal if allowed is None else allowed & causal
  if allowed is None:
    return inputs, None
  allowed = jnp.broadcast_to(allowed, (*allowed.shape[:-2], n, m))
  rows, columns = allowed.any(-1)[..., None], allowed.any(-2)[..., None]
  excluded = inputs._replace(
    query=jnp.where(rows, inputs.query, 0.0),
    key=jnp.where(columns, inputs.key, 0.0),
    value=jnp.where(columns, inputs.value, jnp.zeros((), inputs.value.dtype)),
  )
  return excluded, allowed
