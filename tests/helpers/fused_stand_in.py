"""JAX's own fused attention in the place of cuDNN's, where there is no GPU."""

import jax
import jax.numpy as jnp


def fused(query, key, value, scale):
  """Under the contract of `fused_attention` of `cudnn`, which it checks."""
  assert query.shape[-1] % 8 == 0
  assert query.shape[-1] == key.shape[-1] == value.shape[-1]
  dtype = query.dtype
  assert dtype == key.dtype == value.dtype
  if dtype == jnp.float16:  # which JAX does not multiply on a CPU
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
  out = jax.nn.dot_product_attention(
    query, key, value, scale=scale, implementation="xla"
  )
  return out.astype(dtype)
