"""Arithmetic that must not be rounded: dtypes, promotion and products."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

T = TypeVar("T")


def with_usual_promotion(function: Callable[..., T]) -> Callable[..., T]:
  """The function under JAX's usual promotion of ranks and dtypes.

  Who forbids it (`jax_numpy_rank_promotion`, `jax_numpy_dtype_promotion`) looks for
  faults of their own code, not of this package's. Backward passes are traced later than
  their function was, and need it themselves.
  """

  @functools.wraps(function)
  def run(*args: Any, **kwargs: Any) -> T:
    with (
      jax.numpy_rank_promotion("allow"),
      jax.numpy_dtype_promotion("standard"),
    ):
      return function(*args, **kwargs)

  return run


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
