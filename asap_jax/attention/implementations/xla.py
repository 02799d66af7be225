"""Doubly stochastic attention from one side's dual, without forming the plan.

On a CPU memory takes most of the time of one large kernel, so that none is formed. Few
closures of short sequences are one expression in the log domain (`xla_short`). The
batch of longer ones is worked off in blocks whose kernels stay in the cache, in the
scaling domain (`asap_jax.c_transform`). On other devices all of it is one block, and
few closures are that one expression at any length: it has no range to look after, so no
loop until data say so, and devices that share a batch need not ask each other.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations import xla_short
from asap_jax.attention.implementations.blocks import in_cache
from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import check_closures, row_sums
from asap_jax.c_transform.scaling_domain import ScaledPlan, scaled_plan
from asap_jax.c_transform.segments import Segments
from asap_jax.dual_map.predict import DualMap, linear_dual
from asap_jax.masses import Masses, Side, valid_pairs, zero_invalid
from asap_jax.numerics import logits_einsum


def scaled_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  dual: Float[Array, "..."],
  count: int = 1,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  bias: Float[Array, "..."] | None = None,
  segments: Segments | None = None,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures of a dual, which is not formed.

  The plan is that of `asap_jax.closures` for S = query key^T + bias, so Sinkhorn cut to
  `count` iterations if the dual is zero. Works under jit, vmap and grad; derivatives of
  every order are those of the log domain.

  Args:
    query: `[..., n, dim]`, carrying the scale of the logits.
    key: `[..., m, dim]`.
    value: `[..., m, features]`.
    dual: to start at, `[..., n]` or `[..., m]`; see `asap_jax.closures`.
    count: closures; from the key side none will do.
    query_weights: `None`, mask or masses, broadcast to `[..., n]`.
    key_weights: the same of the keys, to `[..., m]`; values of absent keys may hold
      anything.
    bias: added to the logits, broadcast to `[..., n, m]`.
    segments: of packed sequences, with their masses as the keys' weights.
    relaxation: between closures; see `asap_jax.closures`, as the next two.
    momentum: likewise.
    side: whose dual it is.
    precision: of the products with keys and values.

  Returns:
    `[..., n, features]` in the dtype of `value`, zero at absent queries.

  Raises:
    ValueError: as `asap_jax.closures`.
  """
  check_closures(count, relaxation, momentum, side)
  attend, short = (
    functools.partial(each, count, side, precision)
    for each in (_scaling_domain, _short)
  )
  weights = query_weights, key_weights
  pairs_of = (bias, *(segments or (None, None)))
  arguments = query, key, value, dual, *weights, relaxation, momentum, *pairs_of
  batch, pairs = query.shape[:-2], query.shape[-2] * key.shape[-2]
  if xla_short.is_short(count, query.shape[-2], key.shape[-2], *weights):
    return short(*arguments)
  if bias is not None:
    pairs = 0  # no blocks: it need not have the batch's axes
  elsewhere = short if count <= xla_short.FEW else None
  own = (2, 2, 2, *(1,) * 5, 2, 1, 1)
  return in_cache(attend, batch, pairs, arguments, own, elsewhere=elsewhere)


def _short(count, side, precision, query, key, value, dual, *rest):
  *weights, relaxation, momentum, bias, of_queries, of_keys = rest
  pairs = valid_pairs(*weights)
  if bias is not None and pairs is not None:
    bias = jnp.where(pairs, bias, 0.0)  # it may hold anything there
  logits = logits_of(query, key, (bias, of_queries, of_keys), precision)
  steps: dict[str, Any] = {
    "relaxation": relaxation,
    "momentum": momentum,
    "side": side,
    "precision": precision,
  }
  return xla_short.closed_values(logits, dual, value, count, *weights, **steps)


def predicted_attention(
  dual_map: DualMap,
  seen: Activation,
  value: Float[Array, "*batch heads m features"],
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch heads n features"]:
  """Values under the closures of a map without slices, predicted block by block.

  The same as `predict_dual` and `scaled_attention`; the cumulants read the products
  that the kernel is made of.

  Args:
    dual_map: linear, without slices.
    seen: queries, keys and masks, without a bias.
    value: `[..., heads, m, features]`; those of absent keys may hold anything.
    precision: of the products with keys and values.
  """

  def block(query, key, value, query_weights, key_weights, *leaves):
    own = jax.tree.unflatten(structure, leaves)
    products = logits_of(query, key, precision=precision)
    weights = query_weights, key_weights
    dual = linear_dual(own, query, key, *weights, products=products)
    if own.closures <= 1:
      # Few exponentials: a scaling domain would not pay its checks of the range.
      return xla_short.closed_values(
        products, dual, value, own.closures, *weights, precision, **own.steps
      )
    scaled = scaled_plan(
      products, dual, own.closures, *weights, **own.steps, finite=True
    )
    return _applied(scaled, value, query_weights, key_weights, precision)

  leaves, structure = jax.tree.flatten(dual_map)
  arguments = seen.query, seen.key, value, *seen.masks, *leaves
  batch, pairs = seen.query.shape[:-2], seen.query.shape[-2] * seen.key.shape[-2]
  own = (2, 2, 2, 1, 1, *(leaf.ndim - 1 for leaf in leaves))
  return in_cache(block, batch, pairs, arguments, own)


def _scaling_domain(count, side, precision, query, key, value, dual, *rest):
  *weights, relaxation, momentum, bias, of_queries, of_keys = rest
  logits = logits_of(query, key, (bias, of_queries, of_keys), precision)
  steps = {"relaxation": relaxation, "momentum": momentum, "side": side}
  scaled = scaled_plan(logits, dual, count, *weights, **steps, finite=bias is None)
  return _applied(scaled, value, weights[0], weights[1], precision)


def _applied(
  scaled: ScaledPlan,
  value: Array,
  query_weights: Masses,
  key_weights: Masses,
  precision: jax.lax.PrecisionLike,
) -> Array:
  """The plan times values, its rows normalised once more.

  XLA makes one loop of a product whose sums are taken beside it, in two thirds of the
  time of the product alone (JAX 0.10.2, 192 heads of 64 tokens on 2 CPU cores: 1.0
  instead of 1.5 ms).
  """
  dtype = jnp.float32 if value.dtype == jnp.float16 else value.dtype
  weights = scaled.kernel * scaled.columns[..., None, :]
  rows = row_sums(query_weights, weights.shape[-2])
  sums = weights.sum(-1)
  sums = jnp.where(sums == 0, 1.0, sums)
  out = jnp.einsum(
    "...nm,...mv->...nv",
    weights.astype(dtype),
    zero_invalid(value, key_weights, axis=-2).astype(dtype),
    precision=precision,
    preferred_element_type=weights.dtype,
  )
  return (out * (rows / sums)[..., None]).astype(value.dtype)


def logits_of(
  query: Array,
  key: Array,
  pairs: Sequence[Array | None] = (None, None, None),
  precision: jax.lax.PrecisionLike = None,
) -> Array:
  """Logits of queries and keys.

  Args:
    query: `[..., n, dim]`.
    key: `[..., m, dim]`.
    pairs: what else is known of pairs: a bias, and the segments of both sides.
    precision: of the product.
  """
  bias, query_segments, key_segments = pairs
  logits = logits_einsum("...nd,...md->...nm", query, key, precision=precision)
  logits = logits if bias is None else logits + bias
  if query_segments is None or key_segments is None:
    return logits
  return logits + Segments(query_segments, key_segments).log_kernel
