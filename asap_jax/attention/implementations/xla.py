"""Doubly stochastic attention from one side's dual, without forming the plan.

On a CPU memory takes most of the time of one large kernel, so that none is formed. Few
closures of short sequences are one expression in the log domain (`xla_short`). The
batch of longer ones is worked off in blocks whose kernels stay in the cache, in the
scaling domain (`asap_jax.c_transform`). On other devices all of it is one block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations import xla_short
from asap_jax.attention.implementations.blocks import in_cache
from asap_jax.c_transform.entropic import check_closures
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.masses import Masses, Side


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
  arguments = query, key, value, dual, *weights, relaxation, momentum, bias
  batch, pairs = query.shape[:-2], query.shape[-2] * key.shape[-2]
  if xla_short.is_short(count, query.shape[-2], key.shape[-2]):
    return jax.lax.platform_dependent(*arguments, cpu=short, default=attend)
  if bias is not None:
    return attend(*arguments)
  return in_cache(attend, batch, pairs, arguments, own=(2, 2, 2, 1, 1, 1, 1, 1, 2))


def _short(count, side, precision, query, key, value, dual, *rest):
  *weights, relaxation, momentum, bias = rest
  logits = _logits(query, key, bias, precision)
  steps: dict[str, Any] = {
    "relaxation": relaxation,
    "momentum": momentum,
    "side": side,
    "precision": precision,
  }
  return xla_short.closed_values(logits, dual, value, count, *weights, **steps)


def _scaling_domain(count, side, precision, query, key, value, dual, *rest):
  *weights, relaxation, momentum, bias = rest
  logits = _logits(query, key, bias, precision)
  steps = {"relaxation": relaxation, "momentum": momentum, "side": side}
  scaled = scaled_plan(logits, dual, count, *weights, **steps)
  return scaled.apply(value, weights[1], precision=precision)


def _logits(
  query: Array, key: Array, bias: Array | None, precision: jax.lax.PrecisionLike
) -> Array:
  products = jnp.einsum("...nd,...md->...nm", query, key, precision=precision)
  return products if bias is None else products + bias
