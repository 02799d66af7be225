"""Exact iterations in the scaling domain, the rival of what is exported.

Two products of a matrix and a vector an iteration, and one exponential in all. It is
right while no sum leaves the range of float32, which nothing here looks after: exported
teachers are in the log domain, which holds for any logits.
"""

from typing import Any

import jax
import jax.numpy as jnp

_LOW = -1e30


def scaling_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  mask: jax.Array | None = None,
  iterations: int = 20,
  **_: Any,
) -> jax.Array:
  """Sinkhorn attention of soft logits; arguments as in `asap_jax.attention`."""
  query, key, value = (jnp.moveaxis(x, -2, -3) for x in (query, key, value))
  scores = jnp.matmul(key, jnp.swapaxes(query * query.shape[-1] ** -0.5, -1, -2))
  rows = jnp.ones_like(query[..., 0])[..., None, :]
  columns = jnp.ones_like(key[..., 0])[..., None, :]
  if mask is not None:
    rows, columns = (
      rows * mask.any(-1)[..., None, :],
      columns * mask.any(-2)[..., None, :],
    )
    scores = jnp.where(rows > 0, scores, _LOW)
  kernel = jnp.exp(scores - scores.max(-1, keepdims=True))
  turned = jnp.swapaxes(kernel, -1, -2)
  u = rows
  for _k in range(iterations):
    v = columns / jnp.matmul(u, turned)
    sums = jnp.matmul(v, kernel)
    u = rows / (sums if mask is None else jnp.where(rows > 0, sums, 1.0))
  out = jnp.swapaxes(u, -1, -2) * jnp.matmul(turned, jnp.swapaxes(v, -1, -2) * value)
  return jnp.moveaxis(out, -3, -2)
