"""Values under the plan of few closures, as one expression in the log domain.

XLA fuses it on a CPU, the products included, to one loop over the heads with everything
in the cache: sums, maxima and exponentials, but no branch and no loop of its own. So it
has no range to leave, unlike `asap_jax.c_transform.scaling_domain`, and takes two
exponentials of a pair a closure. Its memory is that of the logits where XLA does not
fuse.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import row_sums
from asap_jax.masses import Weights, masses, zero_invalid

# Stands for log 0, as in `c_transform`.
_LOG_ZERO = -1e30


def closed_values(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  value: Float[Array, "*#batch m features"],
  count: int,
  relaxation: Float[Array, "..."] | None = None,
  query_weights: Weights = None,
  key_weights: Weights = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `asap_jax.c_transform.closures`.

  The last closure normalises columns, and its rows are then those of softmax. Works
  under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    f: query-side dual to start at, `[..., n]`, anything at absent queries.
    value: `[..., m, features]`; those of absent keys may hold anything.
    count: closures, at least one; all of them are unrolled.
    relaxation: omega between closures, `[..., count - 1]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.
    precision: of the product with the values.

  Returns:
    `[..., n, features]` in the dtype of `value`, zero at absent queries.
  """
  dtype = jnp.promote_types(jnp.promote_types(logits.dtype, f.dtype), jnp.float32)
  logits = logits.astype(dtype)
  rows = row_sums(query_weights, logits.shape[-2])
  log_rows = _log(rows)
  # Whatever the number of queries: rows are normalised in the end.
  log_columns = _log(masses(key_weights, logits.shape[-1]))

  def scores_of(f):
    if query_weights is not None:
      f = jnp.where(rows > 0, f, _LOG_ZERO)
    scores = jax.nn.log_softmax(logits + f[..., None], axis=-2)
    return scores if key_weights is None else scores + log_columns[..., None, :]

  for closure in range(count - 1):
    scores = scores_of(f)
    largest = _largest(scores)
    sums = jnp.sum(jnp.exp(scores - largest), axis=-1)
    change = -largest[..., 0] - jnp.log(sums)
    if query_weights is not None:
      change = change + log_rows
    if relaxation is not None:
      change = change * relaxation[..., closure, None]
    f = f + change
  scores = scores_of(f)
  kernel = jnp.exp(scores - _largest(scores))
  out = jnp.einsum(
    "...nm,...mv->...nv",
    kernel.astype(value.dtype),
    zero_invalid(value, key_weights, axis=-2),
    precision=precision,
    preferred_element_type=kernel.dtype,
  )
  # Divided after the product: a division between would end the loop.
  out = out / kernel.sum(-1, keepdims=True)
  return (out if query_weights is None else rows[..., None] * out).astype(value.dtype)


def _log(sums: Array) -> Array:
  return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1.0)), _LOG_ZERO)


def _largest(scores: Array) -> Array:
  return jax.lax.stop_gradient(scores.max(-1, keepdims=True))
