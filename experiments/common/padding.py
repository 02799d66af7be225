"""Padded batches, as experiments time them."""

import jax
import jax.numpy as jnp
from flax import nnx


def ragged(batch: int, length: int) -> jax.Array:
  """Valid tokens `[batch, length]` of sequences from a quarter of the length to all."""
  lengths = jnp.linspace(length // 4, length, batch).astype(int)
  return jnp.arange(length) < lengths[:, None]


def pairs_of(valid: jax.Array) -> jax.Array:
  """Boolean mask `[batch, 1, length, length]` of pairs of valid tokens."""
  return nnx.make_attention_mask(valid, valid, dtype=bool)
