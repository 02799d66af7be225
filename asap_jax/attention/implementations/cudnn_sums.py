"""Duals and values from calls of a fused softmax attention, in 16-bit inputs.

**A dual** is one unbiased call with the roles of the two sides chosen so that the sum
goes over the right one; what it needs from the kernel are shares of softmax mass, which
are averages of values of our own choosing. With p_i proportional to exp(S_ij),

    LSE_i(S_ij + f_i) = LSE_{i in R}(S_ij) + log(sum_i p_i exp(f_i) / sum_{i in R} p_i)

for any subset R. The first term is a small product in float32, of a few dozen points R;
the two sums are value columns. The kernel's own log-sum-exp is no use here:
`jax.nn.dot_product_attention` (to JAX 0.11) rounds it to the dtype of its inputs, in
bfloat16 by up to 0.03 where it is 8, while a share is rounded relative to its size. The
head dimension stays what it is, and as it has columns to spare, each share is computed
in many of them times powers of two between 1 and 2, which round differently: the mean
of their logarithms is several times as exact.

**The values** take a softmax over keys with the dual g as a bias per key. The kernel
takes no such bias, so it goes into the head dimension: three columns of ones on the
queries' side, and on the keys' side g / scale in three parts, each what the ones before
have lost to rounding (24 bits in bfloat16). Absent keys get a very negative bias.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# A fused attention: query, key, value `[batch, length, heads, dim]` and a scale.
Fused = Callable[[Array, Array, Array, float], Array]

# Points whose log-sum-exp is computed beside the kernel.
_REFERENCES = 64
# Columns that carry the bias, and the multiple that the kernel wants of their number.
_PARTS, _ALIGNMENT = 3, 8
# Shares of at least this size have lost nothing that matters to underflow: what the
# dtype cannot hold beside a maximum of one is smaller by far, all points together.
_LEAST_SHARE = {"bfloat16": 1e-30, "float16": 1e-3}
# Stands for minus log 0, before the scale; two of them must not overflow.
_LOG_ZERO = {"bfloat16": 2.0**40, "float16": 2.0**14}

DTYPES = tuple(_LEAST_SHARE)


def head_dim(dim: int, features: int) -> int:
  """The largest head dimension among the calls for queries and values so wide."""
  return max(_aligned(dim + _PARTS), _aligned(features))


def transform(
  fused: Fused,
  source: Array,
  target: Array,
  source_sums: Array,
  target_sums: Array,
  dual: Array,
  scale: float,
) -> tuple[Array, Array]:
  """The dual of the target side from that of the source; whether it can be trusted.

  Points are absent where the plan's sums are zero.
  """
  dtype, (size, dim) = source.dtype, source.shape[-2:]
  # Absent points are zeros: they take part in the softmax, but in no sum.
  dual = jnp.where(source_sums > 0, dual, -jnp.inf)
  largest = dual.max(-1, keepdims=True, initial=-1e30)
  chosen = np.arange(0, size, -(-size // _REFERENCES))
  indicator = np.zeros(size, np.float32)
  indicator[chosen] = 1.0
  half = _aligned(dim) // 2
  factors = jnp.exp2(jnp.arange(half) / half)
  sums = jnp.stack(
    jnp.broadcast_arrays(jnp.exp(dual - largest), jnp.asarray(indicator)), -1
  )
  columns = (sums[..., None] * factors).reshape(*sums.shape[:-1], 2 * half)
  shares = _call(fused, target, source, columns.astype(dtype), scale)
  shares = shares.reshape(*shares.shape[:-1], 2, half) / factors
  least = shares.min((-2, -1))
  exact = ((least >= _LEAST_SHARE[str(dtype)]) | (target_sums == 0)).all()
  logs = jnp.log(jnp.maximum(shares, 1e-37)).mean(-1)
  logits = scale * jnp.einsum(
    "...td,...sd->...ts",
    target,
    source[..., chosen, :],
    preferred_element_type=jnp.float32,
  )
  known = jax.nn.logsumexp(logits, axis=-1)
  log_sums = known + logs[..., 0] - logs[..., 1] + largest
  present = target_sums > 0
  log_target = jnp.log(jnp.where(present, target_sums, 1.0))
  return jnp.where(present, log_target - log_sums, 0.0), exact


def values(
  fused: Fused,
  query: Array,
  key: Array,
  value: Array,
  g: Array,
  rows: Array,
  columns: Array,
  scale: float,
) -> Array:
  """Values under the softmax over keys with bias g, times the plan's row sums."""
  dtype, present = query.dtype, columns > 0
  # A constant changes nothing, and small numbers are rounded less.
  g = g - jnp.where(present, g, -jnp.inf).max(-1, keepdims=True, initial=-1e30)
  absent = -math.copysign(_LOG_ZERO[str(dtype)], scale)
  parts = _parts(jnp.where(present, g / scale, absent), dtype)
  ones = jnp.ones((*query.shape[:-1], _PARTS), dtype)
  query, key = (
    jnp.concatenate([points, columns], -1)
    for points, columns in ((query, ones), (key, parts))
  )
  out = _call(fused, query, key, value, scale)
  return jnp.where(rows[..., None] > 0, rows[..., None] * out, 0.0).astype(value.dtype)


def fits(g: Array, columns: Array, dtype: jnp.dtype, scale: float) -> Array:
  """Whether a dual that no iteration made is in the range of `values`."""
  present = columns > 0
  largest = jnp.where(present, g, -jnp.inf).max(-1, keepdims=True, initial=-1e30)
  below = jnp.where(present, largest - g, 0.0)
  return (below < 0.5 * _LOG_ZERO[str(dtype)] * abs(scale)).all()


def _parts(bias: Array, dtype: jnp.dtype) -> Array:
  """Numbers of a low precision that add up to `bias` `[...]`, `[..., _PARTS]`."""
  parts = []
  for _ in range(_PARTS):
    # Else a compiler that keeps excess precision would find that nothing is left over.
    parts.append(jax.lax.reduce_precision(bias, *_bits(dtype)))
    bias = bias - parts[-1]
  return jnp.stack(parts, -1).astype(dtype)


def _bits(dtype: jnp.dtype) -> tuple[int, int]:
  info = jnp.finfo(dtype)
  return info.nexp, info.nmant


def _call(fused: Fused, query: Array, key: Array, value: Array, scale: float) -> Array:
  """The fused attention of `[..., length, dim]`, float32, as wide as the values."""
  features = value.shape[-1]
  width = max(_aligned(query.shape[-1]), _aligned(features))

  def lay_out(array):
    array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])])
    array = (
      array.reshape(-1, *array.shape[-3:]) if array.ndim > 2 else array[None, None]
    )
    return jnp.moveaxis(array, -3, -2)

  laid_query, laid_key, laid_value = map(lay_out, (query, key, value))
  out = fused(laid_query, laid_key, laid_value, scale)
  out = jnp.moveaxis(out, -2, -3).reshape(*query.shape[:-1], width)
  return out[..., :features].astype(jnp.float32)


def _aligned(size: int) -> int:
  return -(-size // _ALIGNMENT) * _ALIGNMENT
