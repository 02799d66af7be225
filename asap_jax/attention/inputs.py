"""What every attention function does before and after its plan: inputs and values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.cudnn import cudnn_attention
from asap_jax.attention.implementations.dispatch import Implementation, choose
from asap_jax.attention.implementations.xla import scaled_attention
from asap_jax.masses import zero_invalid


class Inputs(NamedTuple):
  """Attention inputs with heads in front: `[batch..., heads, length, dim]`.

  Attributes:
    query: float32 or better, multiplied by scale / epsilon.
    key: one per query head.
    value: likewise, in the result's dtype.
    bias: added to query key^T, or `None`.
    precision: of the products.
    unscaled: `query` in the inputs' dtype, before the multiplication.
    scale: scale / epsilon.
    query_mask: valid queries, `[batch..., heads or 1, n]`, or `None` for all.
    key_mask: valid keys, `[batch..., heads or 1, m]`, or `None` for all.
    is_product: per element, whether the mask was the outer product of the two; `None`
      where that is known.
  """

  query: Array
  key: Array
  value: Array
  bias: Array | None
  precision: jax.lax.PrecisionLike
  unscaled: Array
  scale: float | Array
  query_mask: Array | None = None
  key_mask: Array | None = None
  is_product: Array | None = None

  @property
  def logits(self) -> Float[Array, "*batch heads n m"]:
    """S = query key^T + bias."""
    logits = jnp.einsum(
      "...nd,...md->...nm", self.query, self.key, precision=self.precision
    )
    return logits if self.bias is None else logits + self.bias


def prepare(
  query: Array,
  key: Array,
  value: Array,
  bias: Array | None = None,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  scale: float | None = None,
  epsilon: float = 1.0,
) -> Inputs:
  """Checks and lays out the arguments of an attention function.

  Raises:
    ValueError: if shapes do not fit or `epsilon` is not positive.
  """
  _check_shapes(query, key, value)
  if epsilon <= 0:
    raise ValueError(f"epsilon={epsilon}: expected a positive number")
  heads, dim = query.shape[-2:]
  if dtype is None:
    dtype = jnp.result_type(query, key, value)
  groups = heads // key.shape[-2]
  query, key, value = (
    jnp.moveaxis(x, -2, -3).astype(dtype) for x in (query, key, value)
  )
  if groups > 1:
    key, value = (jnp.repeat(x, groups, axis=-3) for x in (key, value))
  # Low-precision inputs lose nothing, low-precision logits lose 4% of a marginal.
  wide = jnp.promote_types(dtype, jnp.float32)
  scale = (dim**-0.5 if scale is None else scale) / epsilon
  scaled, key = query.astype(wide) * scale, key.astype(wide)
  return Inputs(scaled, key, value, bias, precision, query, scale)


def restrict(inputs: Inputs, mask: jax.Array | None, is_causal: bool) -> Inputs:
  """`inputs` with the valid queries and keys of a doubly stochastic plan.

  Raises:
    ValueError: for causal use, one-token decoding, or a mask that is not the outer
      product of valid queries and valid keys.
  """
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  if is_causal:
    raise ValueError(
      "is_causal=True: a causal doubly stochastic matrix is the identity (row 1 must "
      "put all its mass on column 1, and so on); use softmax_attention in causal layers"
    )
  if n == 1 and m > 1:
    raise ValueError(
      f"query has one token, key {m}: the doubly stochastic plan of a single query is "
      "uniform whatever its content, so one-token decoding has no doubly stochastic "
      "form; use softmax_attention in decoders"
    )
  if mask is None:
    return inputs
  query_mask, key_mask, is_product = _split_mask(mask, n, m)
  # Padding may hold anything, NaN included: none of it may reach a gradient.
  return inputs._replace(
    query=zero_invalid(inputs.query, query_mask, axis=-2),
    unscaled=zero_invalid(inputs.unscaled, query_mask, axis=-2),
    key=zero_invalid(inputs.key, key_mask, axis=-2),
    value=zero_invalid(inputs.value, key_mask, axis=-2),
    query_mask=query_mask,
    key_mask=key_mask,
    is_product=is_product,
  )


def attend(
  inputs: Inputs,
  weights: Float[Array, "*batch heads n m"],
  *,
  dropout_rng: jax.Array | None,
  dropout_rate: float,
  broadcast_dropout: bool,
  module: Any,
) -> Float[Array, "*batch n heads features"]:
  """Applies attention weights to the values, with dropout, sowing and mask check."""
  if inputs.is_product is not None:
    weights = jnp.where(inputs.is_product, weights, jnp.nan)
  if module is not None:
    kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(kind, "attention_weights", weights)
  if dropout_rate > 0.0:
    if dropout_rng is None:
      raise ValueError("dropout_rng=None: expected a PRNG key, for dropout is active")
    shape = weights.shape
    if broadcast_dropout:
      shape = (1,) * (len(shape) - 2) + shape[-2:]
    keep = jax.random.bernoulli(dropout_rng, 1.0 - dropout_rate, shape)
    weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
  out = jnp.einsum(
    "...nm,...mv->...nv",
    weights.astype(inputs.value.dtype),
    inputs.value,
    precision=inputs.precision,
  )
  return jnp.moveaxis(out, -3, -2)


def attend_scaled(
  inputs: Inputs,
  f: Float[Array, "*batch heads n"] | Callable[..., Array],
  count: int,
  relaxation: Float[Array, "..."] | None,
  implementation: Implementation | None = None,
) -> Float[Array, "*batch n heads features"]:
  """Applies the plan of `count` closures from f to the values, with mask check.

  What is given for f may predict it, as in `scaled_attention`.

  Raises:
    ValueError: if the named implementation cannot serve (`implementations.choose`).
  """
  # The keys came in this dtype: nothing is rounded.
  narrow = inputs.unscaled, inputs.key.astype(inputs.unscaled.dtype), inputs.value
  options: dict[str, Any] = {
    "relaxation": relaxation,
    "query_weights": inputs.query_mask,
    "key_weights": inputs.key_mask,
    "bias": inputs.bias,
    "precision": inputs.precision,
  }
  chosen = choose(implementation, *narrow, bias=inputs.bias, scale=inputs.scale)
  if callable(f) and chosen != "xla":
    f = f(inputs.query, inputs.key, inputs.query_mask, inputs.key_mask)
  functions: dict[Implementation, Callable[..., Array]] = {
    "xla": scaled_attention,
    "chunked": chunked_attention,
    "cudnn": cudnn_attention,
  }
  tokens = inputs.query, inputs.key, inputs.value
  if chosen == "cudnn":
    tokens, options["scale"] = narrow, inputs.scale
  out = functions[chosen](*tokens, f, count, **options)
  if inputs.is_product is not None:
    out = jnp.where(inputs.is_product, out, jnp.nan)
  return jnp.moveaxis(out, -3, -2)


def _check_shapes(query: Array, key: Array, value: Array) -> None:
  shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
  if not query.ndim == key.ndim == value.ndim or query.ndim < 3:
    raise ValueError(f"{shapes}: expected [batch..., length, heads, dim] for each")
  if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
    raise ValueError(f"{shapes}: expected equal batch axes")
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(f"{shapes}: expected query and key of the same head dimension")
  if key.shape[-3:-1] != value.shape[-3:-1]:
    raise ValueError(f"{shapes}: expected key and value of the same length and heads")
  if query.shape[-2] % key.shape[-2]:
    raise ValueError(
      f"{shapes}: expected the query's heads to be a multiple of the key's"
    )


def _split_mask(mask: Array, n: int, m: int) -> tuple[Array, Array, Array | None]:
  """Valid queries, valid keys, and whether the mask is their outer product."""
  if mask.ndim < 3 or mask.shape[-2] not in (1, n) or mask.shape[-1] not in (1, m):
    raise ValueError(
      f"mask has shape {mask.shape}: expected [batch..., heads or 1, {n}, {m}]"
    )
  if 1 in mask.shape[-2:] and n == m > 1:
    raise ValueError(
      f"mask has shape {mask.shape}, which speaks of one side alone: padding must be "
      "excluded from queries and keys, so pass nnx.make_attention_mask(query_valid, "
      "key_valid)"
    )
  mask = mask != 0
  queries, keys = mask.any(-1), mask.any(-2)
  is_product = None
  if 1 not in mask.shape[-2:]:
    product = queries[..., :, None] & keys[..., None, :]
    is_product = (mask == product).all((-2, -1), keepdims=True)
    if not isinstance(is_product, jax.core.Tracer):
      if not is_product.all():
        raise ValueError(
          "mask is not the outer product of valid queries and valid keys: a causal or "
          "block mask has no doubly stochastic plan in general; pass "
          "nnx.make_attention_mask(query_valid, key_valid)"
        )
      is_product = None
  queries = jnp.broadcast_to(queries, (*queries.shape[:-1], n))
  keys = jnp.broadcast_to(keys, (*keys.shape[:-1], m))
  return queries, keys, is_product
