"""Attentions by name, and the encoders that hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asap_jax.peers import lambda_init
from experiments.common.attentions import TRAINABLE, build, build_attention
from experiments.common.models import Encoder, EncoderConfig

TINY = EncoderConfig(length=6, token_size=1, classes=3, width=8, heads=2, layers=2)


RANDOM = np.random.default_rng(0)


TOKENS = RANDOM.normal(size=(7, TINY.length, 1)).astype(np.float32)


LABELS = RANDOM.integers(3, size=7)


QUICK = ("softmax", "lot", "sinkhorn@2")


@pytest.mark.parametrize(
  "name",
  [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*TRAINABLE, "sinkhorn@2")
  ],
)
def test_each_name_trains(name):
  model = build(name, dataclasses.replace(TINY, layers=1), seed=0)

  @nnx.jit
  def slopes_of(model):
    def loss(model):
      scores = jax.nn.log_softmax(model(TOKENS))
      return -jnp.take_along_axis(scores, LABELS[:, None], axis=-1).mean()

    return nnx.grad(loss)(model)

  slopes = {
    "/".join(map(str, path)): float(jnp.abs(slope[...]).max())
    for path, slope in nnx.to_flat_state(slopes_of(model))
  }
  assert all(np.isfinite(slope) for slope in slopes.values())
  # Biases of keys cancel in row normalisations; a coupling chosen by sorting has no
  # slope in what it sorts.
  of_query = slopes["blocks/0/attention/query/kernel"]
  assert (of_query > 0) == (name != "swgg")
  learned = [slope for path, slope in slopes.items() if "attention_fn" in path]
  assert bool(learned) == (name in ("esp", "lot", "differential", "amortized"))
  # Of the last the map has a loss of its own.
  assert all((slope > 0) == (name != "amortized") for slope in learned)
  assert slopes["blocks/0/attention/value/kernel"] > 0


def test_functions_are_shared_and_layers_counted_from_one():
  given = {"heads": 2, "dim": 4, "rngs": nnx.Rngs(0)}
  first, second = (
    [build_attention(name, layer=layer, **given) for name in ("est", "differential")]
    for layer in (1, 2)
  )
  assert first[0] is second[0]
  assert first[0].keywords == {"inverse_temperature": 1.0}
  for layer, (_, module) in enumerate((first, second), 1):
    assert dict(module.options) == {"initial": lambda_init(layer)}


def test_all_but_the_attention_starts_alike_under_one_seed():
  states = [
    {
      path: np.asarray(value[...])
      for path, value in nnx.to_flat_state(nnx.state(build(name, TINY, seed)))
      if "attention_fn" not in path and isinstance(value, nnx.Param)
    }
    for name, seed in (("softmax", 0), ("lot", 0), ("softmax", 1))
  ]
  assert states[0].keys() == states[1].keys()
  for path in states[0]:
    np.testing.assert_array_equal(states[0][path], states[1][path])
  path = ("embed", "kernel")
  assert not np.array_equal(states[0][path], states[2][path])


def test_blocks_hold_the_attentions_of_a_sequence():
  def nothing(query, key, value, **given):
    return jnp.zeros_like(value)

  def values(query, key, value, **given):
    return value

  models = [
    Encoder(TINY, functions, nnx.Rngs(0))
    for functions in ([nothing, values], nothing, [nothing, nothing])
  ]
  (embedded, one, two), every, listed = (model.states(TOKENS) for model in models)
  np.testing.assert_array_equal(embedded, every[0])
  np.testing.assert_array_equal(one, every[1])
  assert np.abs(two - every[2]).max() > 1e-3
  np.testing.assert_array_equal(every[2], listed[2])
  with pytest.raises(ValueError, match="attention_fn has 3 functions: expected 2"):
    Encoder(TINY, [nothing] * 3, nnx.Rngs(0))
