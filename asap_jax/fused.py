"""Doubly stochastic attention from a query-side dual, in the scaling domain.

On a CPU the batch is worked off in blocks whose kernels stay in the cache: that takes
less than half the time of one large kernel, most of which is memory. On other devices
all of it is one block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.scaling import scaled_plan
from asap_jax.weights import Weights

# Pairs of tokens in a block on a CPU: 4 MiB of float32.
_BLOCK = 2**20


def scaled_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  f: Float[Array, "*batch n"],
  count: int = 1,
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  bias: Float[Array, "..."] | None = None,
  relaxation: Float[Array, "..."] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures from f, without forming the plan.

  The plan is that of `asap_jax.c_transform.closures` for S = query key^T + bias, so
  Sinkhorn cut to `count` iterations if f is zero. Works under jit, vmap and grad.

  Args:
    query: `[..., n, dim]`, carrying the scale of the logits.
    key: `[..., m, dim]`.
    value: `[..., m, features]`.
    f: query-side dual to start at, `[..., n]`.
    count: closures, at least one.
    query_weights: `None`, mask or masses, broadcast to `[..., n]`.
    key_weights: likewise, to `[..., m]`; values of absent keys may hold anything.
    bias: added to the logits, broadcast to `[..., n, m]`.
    relaxation: see `closures`.
    precision: of the products with keys and values.

  Returns:
    `[..., n, features]` in the dtype of `value`, zero at absent queries.

  Raises:
    ValueError: as `closures`.
  """

  def attend(query, key, value, f, *rest):
    query_weights, key_weights, relaxation = rest
    logits = jnp.einsum("...nd,...md->...nm", query, key, precision=precision)
    if bias is not None:
      logits = logits + bias
    plan = scaled_plan(
      logits, f, count, query_weights, key_weights, relaxation=relaxation
    )
    return plan.apply(value, key_weights, precision=precision)

  arguments = query, key, value, f, query_weights, key_weights, relaxation
  batch, pairs = query.shape[:-2], query.shape[-2] * key.shape[-2]
  if bias is not None or math.prod(batch) * pairs <= _BLOCK:
    return attend(*arguments)
  size = max(_BLOCK // pairs, 1)
  blocked = functools.partial(_by_blocks, attend, batch, size)
  return jax.lax.platform_dependent(*arguments, cpu=blocked, default=attend)


def _by_blocks(function, batch, size, *arguments):
  """`function` of arguments with leading axes `batch`, at most `size` at a time."""
  total = math.prod(batch)
  # Blocks of one size, lest the remainder be compiled by itself.
  size = next(s for s in range(min(size, total), 0, -1) if total % s == 0)

  def split(array, trailing):
    array = jnp.broadcast_to(array, (*batch, *array.shape[array.ndim - trailing :]))
    return array.reshape(-1, size, *array.shape[len(batch) :])

  trailing = (2, 2, 2, 1, 1, 1, 1)
  blocks = [
    None if array is None else split(array, axes)
    for array, axes in zip(arguments, trailing, strict=True)
  ]
  out = jax.lax.map(lambda block: function(*block), blocks)
  return out.reshape(*batch, *out.shape[2:])
