"""What public entries are given, well or badly."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

import asap_jax

HEADS, DIM = 2, 4
TOKENS = jnp.ones((2, 6, HEADS, DIM))
CLOUD = jnp.ones((3, 6, DIM))
LOGITS = jnp.ones((2, 6, 5))
NAN = float("nan")


class Entry(NamedTuple):
  """A public function or class, arguments that it takes, and bad values of each."""

  call: Callable[..., Any]
  good: Mapping[str, Any]
  bad: Mapping[str, list[Any]]


def dual_map(**fields: Any) -> asap_jax.DualMap:
  plain: dict[str, Any] = {
    "directions": jnp.ones((HEADS, 2, DIM)),
    "weights": jnp.ones((HEADS, 2)),
    "features": ("potentials",),
  }
  return asap_jax.DualMap(**plain | fields)


def teacher() -> nnx.Module:
  return asap_jax.SinkhornMultiHeadAttention(
    HEADS, HEADS * DIM, iterations=3, rngs=nnx.Rngs(0)
  )


def compiled() -> nnx.Module:
  model: Any = teacher()
  model.attention_fn = nnx.data(asap_jax.AsapAttention(dual_map()))
  return model
