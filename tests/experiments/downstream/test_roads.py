"""Roads from softmax attention to Sinkhorn attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra `pretrained`")
from flax import nnx
from helpers.encoder_directory import write
from helpers.small_training import PRESET, task

import asap_jax
from experiments.common.train import TrainConfig
from experiments.downstream import roads, training
from experiments.downstream.data import load
from experiments.downstream.pretrained import Pretrained
from experiments.encoders import load_encoder

SINKHORN = {"iterations": 3, "start": "zero"}


def batch(seed=0):
  random = np.random.default_rng(seed)
  valid = np.arange(6) < random.integers(2, 7, size=(16, 1))
  ids = random.integers(4, 20, size=valid.shape).astype(np.int32)
  return {"ids": ids, "valid": valid}


@pytest.fixture
def softmax(tmp_path):
  return load_encoder(write(tmp_path))


def embeddings(encoder, given):
  return np.asarray(encoder(given["ids"], given["valid"]))


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_a_mixture_moves_from_softmax_to_sinkhorn(progress):
  tokens = [jax.random.normal(jax.random.key(i), (2, 5, 2, 4)) for i in range(3)]
  attention = roads.MixedAttention(SINKHORN, 0.0, 0.5)
  roads.advance(nnx.List([attention]), jnp.float32(progress))
  share = min(1.0, 2 * progress)
  new = asap_jax.sinkhorn_attention(*tokens, **SINKHORN)
  old = asap_jax.softmax_attention(*tokens)
  expected = share * new + (1 - share) * old
  np.testing.assert_allclose(attention(*tokens), expected, atol=1e-6)


@pytest.mark.slow
def test_outside_of_training_a_mixture_is_sinkhorn(softmax):
  switch, mixed, layers = (
    roads.convert(softmax, road, SINKHORN, [batch()])
    for road in ("switch", "mixed", "layers")
  )
  expected = embeddings(switch, batch())
  for encoder in (mixed, layers):
    np.testing.assert_allclose(embeddings(encoder, batch()), expected, atol=1e-6)


def test_layers_are_converted_one_after_the_other(softmax):
  encoder = roads.convert(softmax, "layers", SINKHORN, [batch()])
  shares = []
  for progress in (0.0, 0.1, 0.3, 0.6):
    roads.advance(encoder, jnp.float32(progress))
    blocks = encoder.blocks
    shares.append([float(b.attention.attention_fn._share[...]) for b in blocks])
  assert shares == [[0, 0], [1, 0], [1, 1], [1, 1]]


@pytest.mark.slow
def test_the_step_of_training_moves_a_mixture(tmp_path):
  """Its first of many steps is that of softmax, its last one that of Sinkhorn."""
  preset = dataclasses.replace(PRESET, length=6, teacher="sinkhorn@3")
  begun = Pretrained.named(str(write(tmp_path)), preset, 0)
  data = load(task(), preset, tmp_path / "cache", None, begun.coder(preset))
  config = TrainConfig(steps=2000, batch_size=16)
  given = {**batch(), "label": np.arange(16) % 3}
  losses = {}
  for name in ("softmax", "switch", "mixed"):
    model = begun.build(name, preset, data, 0)
    for number in (0, 2000):
      state = training.start(model, config, 0)
      _, metrics = training.step(nnx.graphdef(model), config, state, given, number)
      losses[name, number] = float(metrics[0])
  assert losses["mixed", 0] == pytest.approx(losses["softmax", 0], rel=1e-5)
  assert losses["mixed", 2000] == pytest.approx(losses["switch", 2000], rel=1e-5)
  assert losses["mixed", 0] != pytest.approx(losses["mixed", 2000], rel=1e-5)


@pytest.mark.slow
def test_distillation_comes_nearer_to_softmax_and_reads_no_label(softmax):
  for block in softmax.blocks:
    block.attention.query.kernel[...] *= 30.0  # plans that differ
  encoder = roads.convert(softmax, "switch", SINKHORN, [batch(1)])
  given = ({**batch(seed), "label": np.full(16, -1)} for seed in range(1, 200))
  config = roads.distilling(100, 16)
  before = embeddings(encoder, batch())
  near = roads.distil(encoder, softmax, given, config, "test")
  np.testing.assert_array_equal(embeddings(encoder, batch()), before)
  wanted, found = (embeddings(each, batch()) for each in (softmax, near))
  assert np.linalg.norm(found - wanted) < 0.9 * np.linalg.norm(before - wanted)
  function = near.blocks[0].attention.attention_fn
  assert function.keywords == SINKHORN


def test_the_distance_is_relative_and_leaves_padding_out():
  random = np.random.default_rng(0)
  wanted = jnp.asarray(random.normal(size=(2, 3, 4, 5)), jnp.float32)
  valid = jnp.arange(4) < jnp.asarray([[4], [2], [3]])
  states = jnp.where(valid[..., None], 2 * wanted, jnp.inf)
  found = roads.distance(list(states), list(wanted), valid)
  assert float(found) == pytest.approx(1.0, abs=1e-6)
