"""Arithmetic that must not be rounded: dtypes and products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def float_dtype(*arrays: Array) -> jnp.dtype:
  """Dtype of the arrays together, float32 or better."""
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def exact_einsum(subscripts: str, *operands: Array) -> Array:
  """`jnp.einsum` of float arrays, in the operands' full precision.

  By default a GPU rounds float32 products to TF32 and a TPU to bfloat16: too coarse for
  values that are sorted, inverted or exponentiated.
  """
  return jnp.einsum(
    subscripts,
    *operands,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=float_dtype(*operands),
  )
