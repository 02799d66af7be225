"""Attentions of `asap_jax.peers` by name, to be trained from scratch in an encoder.

Hyperparameters are the defaults of their functions, and where there is none, those of
this module.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import asap_jax
from asap_jax.peers import ATTENTIONS, attention_named
from asap_jax.peers.layers import DifferentialAttention, ESPAttention, LOTAttention
from experiments.common.models import Encoder, EncoderConfig

# As `asap_jax.compile` has it.
SLICES = 8
# A quarter of the digits' tokens.
PIVOTS = 16
_OPTIONS: dict[str, dict[str, Any]] = {
  # At zero, queries and keys would not learn.
  "est": {"inverse_temperature": 1.0},
}
TRAINABLE = (*ATTENTIONS, "amortized")


def build_attention(
  name: str, *, heads: int, dim: int, layer: int, rngs: nnx.Rngs
) -> Callable[..., jax.Array]:
  """The `attention_fn` of one layer.

  Args:
    name: one of `TRAINABLE`, of which `amortized` has a dual map that learns in the
      loop; or `sinkhorn@k` for k full iterations, or `gaussian@k` for so many from the
      Gaussian start.
    heads: number of heads.
    dim: head dimension.
    layer: of the model, counted from one.
    rngs: source of what it learns, stream `params`.

  Returns:
    A module where the attention has parameters of its own, else a function: one object
    for all layers.

  Raises:
    ValueError: if the name is unknown.
  """
  if name == "amortized":
    return asap_jax.AmortizedAttention(heads, dim)
  function = _function(name)
  if name == "esp":
    return ESPAttention(heads, SLICES, dim, rngs=rngs)
  if name == "lot":
    return LOTAttention(heads, PIVOTS, dim, rngs=rngs)
  if name == "differential":
    return DifferentialAttention(dim, layer, rngs=rngs)
  return function


def build(name: str, config: EncoderConfig, seed: int) -> Encoder:
  """An encoder with a named attention; all else starts alike under one seed.

  Raises:
    ValueError: as `build_attention`.
  """
  return Encoder(config, build_functions(name, config, seed), nnx.Rngs(seed))


def build_functions(
  name: str, config: EncoderConfig, seed: int
) -> list[Callable[..., jax.Array]]:
  """A named attention for every block of an encoder, its own weights of `seed` alone.

  Raises:
    ValueError: as `build_attention`.
  """
  rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
  dim = config.width // config.heads
  return [
    build_attention(name, heads=config.heads, dim=dim, layer=layer, rngs=rngs)
    for layer in range(1, config.layers + 1)
  ]


def trainable(text: str) -> str:
  """Type of an argument: a name that `build_attention` takes."""
  try:
    build_attention(text, heads=1, dim=2, layer=1, rngs=nnx.Rngs(0))
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from None
  return text


@functools.cache
def _function(name: str) -> Callable[..., jax.Array]:
  # Before the options: who misspells a name is told so.
  attention_named(name)
  base = name.partition("@")[0]
  options = _OPTIONS.get(base, {})
  return attention_named(name, **options)
