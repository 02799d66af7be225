"""Values under the plan of few closures, as one expression in the log domain.

XLA fuses it on a CPU, the products included, to one loop over the heads with everything
in the cache: sums, maxima and exponentials, but no branch and no loop of its own. So it
has no range to leave, unlike the scaling domain, and takes two exponentials of a pair a
closure. Its memory is that of the logits where XLA does not fuse. Other devices take it
for few closures whatever the length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import LOG_ZERO, advance, row_sums
from asap_jax.dual_map.predict import DualMap, linear_dual
from asap_jax.masses import Masses, Side, normalised, valid, zero_invalid
from asap_jax.numerics import float_dtype
from asap_jax.sizes import Size, at_most

# Pairs of a head, and closures, up to which XLA makes one loop over the heads. Of two
# closures with masks it makes several (2 CPU cores, JAX 0.10.2, 32 padded sequences of
# 256 tokens, 4 heads: 90 ms, and 47 in the scaling domain; without masks 25 and 27).
_SHORT, _FEW_MASKED = 2**16, 1
# Closures up to which other devices take this form: that of more reads logits twice
# where the scaling domain reads a kernel once (H100, JAX 0.11.2, 64 heads of 1,024
# tokens, 20 closures: 7.8 and 4.6 ms).
FEW = 2


def is_short(count: int, n: Size, m: Size, *masks: Masses) -> bool:
  """Whether XLA fuses so many closures of such sequences to one loop on a CPU."""
  few = FEW if all(mask is None for mask in masks) else _FEW_MASKED
  return count <= few and bool(at_most(n * m, _SHORT))


def predicted_values(
  dual_map: DualMap,
  seen: Activation,
  value: Float[Array, "*batch heads m features"],
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch heads n features"]:
  """Values under the closures of a linear map's dual, the prediction fused with them.

  The same as `predict_dual` and `closed_values`, but the cumulants read the logits'
  products instead of a covariance, and f is not centred: an arbitrary constant per
  sequence and head, cancelled by the next closure, while a reduction over queries would
  end XLA's loop. On 2 CPU cores (JAX 0.10.2, float32, 8 sequences of 128 tokens, 8
  heads of dimension 64) that takes 6.1 instead of 7.7 ms with 8 slices, 3.7 instead of
  5.3 without, where softmax takes 4.2.

  Args:
    dual_map: without a network, whose inputs would be kept in memory.
    seen: queries, keys, bias and masks.
    value: `[..., heads, m, features]`; those of absent keys may hold anything.
    precision: of the product with the values.

  Returns:
    `[..., heads, n, features]`.
  """
  products = seen.products
  dual = linear_dual(dual_map, seen.query, seen.key, *seen.masks, products=products)
  bias = seen.bias_of_pairs
  logits = products if bias is None else products + bias
  return closed_values(
    logits, dual, value, dual_map.closures, *seen.masks, precision, **dual_map.steps
  )


def closed_values(
  logits: Float[Array, "*batch n m"],
  dual: Float[Array, "..."],
  value: Float[Array, "*#batch m features"],
  count: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  precision: jax.lax.PrecisionLike = None,
  *,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `asap_jax.closures`.

  The last closure normalises columns, and its rows are then those of softmax. Works
  under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    dual: to start at, `[..., n]` or `[..., m]`, anything at absent points.
    value: `[..., m, features]`; those of absent keys may hold anything.
    count: closures; all of them are unrolled.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.
    precision: of the product with the values.
    relaxation: omega between closures, `[..., count - 1]`.
    momentum: likewise.
    side: whose dual it is.

  Returns:
    `[..., n, features]` in the dtype of `value`, zero at absent queries.
  """
  dtype = float_dtype(logits, dual)
  logits = logits.astype(dtype)
  rows = row_sums(query_weights, logits.shape[-2])
  # Masks are sums and products from here on: a select would end XLA's loop.
  present = (rows > 0).astype(dtype)
  no_query, log_rows = LOG_ZERO * (1.0 - present), present * _log(rows)
  # Whatever the number of queries: rows are normalised in the end.
  log_columns = _log(normalised(key_weights, logits.shape[-1]))

  def scores_from_queries(f):
    if query_weights is not None:
      f = f + no_query
    scores = jax.nn.log_softmax(logits + f[..., None], axis=-2)
    return scores if key_weights is None else scores + log_columns[..., None, :]

  def to_queries(scores):
    largest = _largest(scores)
    sums = jnp.sum(jnp.exp(scores - largest), axis=-1)
    change = -largest[..., 0] - jnp.log(sums)
    return change if query_weights is None else present * (change + log_rows)

  f = before = zero_invalid(dual, query_weights if side == "query" else key_weights)
  if side == "key":
    present_keys = valid(key_weights)
    g = f if present_keys is None else f + LOG_ZERO * ~present_keys
    scores = logits + g[..., None, :]
    if count > 0:
      f = before = to_queries(scores)
  for k in range(count - 1):
    closed = to_queries(scores_from_queries(f))
    factors = (None if x is None else x[..., k] for x in (relaxation, momentum))
    before, f = f, advance(before, f, f + closed, *factors)
  if count > 0:
    scores = scores_from_queries(f)
  out = softmax_values(scores, zero_invalid(value, key_weights, axis=-2), precision)
  return out if query_weights is None else (rows[..., None] * out).astype(value.dtype)


def softmax_values(
  scores: Float[Array, "*batch n m"],
  value: Float[Array, "*#batch m features"],
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the softmax of scores over keys, in the dtype of the values."""
  kernel = jnp.exp(scores - _largest(scores))
  out = jnp.einsum(
    "...nm,...mv->...nv",
    kernel.astype(value.dtype),
    value,
    precision=precision,
    preferred_element_type=kernel.dtype,
  )
  # Divided after the product: a division between would end the loop.
  return (out / kernel.sum(-1, keepdims=True)).astype(value.dtype)


def _log(sums: Array) -> Array:
  return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1.0)), LOG_ZERO)


def _largest(scores: Array) -> Array:
  return jax.lax.stop_gradient(scores.max(-1, keepdims=True))
