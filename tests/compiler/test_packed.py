"""Packed sequences are compiled as if each had come by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.segments import Segments
from asap_jax.compiler.clock import attention_call
from asap_jax.compiler.packed import unpacked

HEADS, WIDTH = 2, 8
LENGTHS = ((5, 3, 4), (7, 4, 1))  # of the sequences in each row
IDS = np.array([np.repeat((1, 2, 3), row) for row in LENGTHS])


class Layer(nnx.Module):
  def __init__(self):
    self.attention = asap_jax.SinkhornMultiHeadAttention(
      HEADS,
      WIDTH,
      iterations=4,
      max_segments=3,
      kernel_init=nnx.initializers.normal(0.8),
      rngs=nnx.Rngs(0),
    )

  def __call__(self, batch):
    ids = batch["segment_ids"]
    mask = nnx.make_attention_mask(ids, ids, jnp.equal, dtype=bool)
    mask &= nnx.make_attention_mask(ids > 0, ids > 0, dtype=bool)
    return self.attention(batch["tokens"], mask=mask)


def packed_batches(count=5):
  tokens = jax.random.normal(jax.random.key(0), (count, *IDS.shape, WIDTH))
  return [{"tokens": each, "segment_ids": jnp.asarray(IDS)} for each in tokens]


def alone(batch):
  """The same sequences, each in an element of the batch."""
  tokens, ids = np.zeros((6, 8, WIDTH), np.float32), np.zeros((6, 8), int)
  for i, (element, segment) in enumerate(np.ndindex(2, 3)):
    own = IDS[element] == segment + 1
    tokens[i, : own.sum()] = batch["tokens"][element, own]
    ids[i, : own.sum()] = 1
  return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("features", [("cumulants",), ("potentials", "query")])
def test_the_map_is_that_of_the_sequences_alone(features):
  recipe = asap_jax.Recipe(features=features, slices=2, refine_steps=0)
  model, batches = Layer(), packed_batches()
  (compiled, report), (wanted, of_alone) = (
    asap_jax.compile(model, given, recipe, progress=False)
    for given in (batches, list(map(alone, batches)))
  )
  own, other = (
    each.attention.attention_fn.dual_map.weights for each in (compiled, wanted)
  )
  np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)
  layer, layer_alone = report.layers[0], of_alone.layers[0]
  np.testing.assert_allclose(layer.tv, layer_alone.tv, rtol=1e-3)
  np.testing.assert_allclose(layer.column_error, layer_alone.column_error, rtol=1e-3)
  # And what is compiled serves packed rows.
  packed, apart = nnx.jit(compiled)(batches[0]), nnx.jit(wanted)(alone(batches[0]))
  np.testing.assert_allclose(packed[0, :5], apart[0, :5], atol=1e-4)
  np.testing.assert_allclose(packed[1, 7:11], apart[4, :4], atol=1e-4)


@pytest.mark.slow
def test_the_best_is_chosen_and_saved(tmp_path):
  model, batches = Layer(), packed_batches(8)
  compiled, report = asap_jax.compile(model, batches, target_tv=0.2, progress=False)
  assert report.layers[0].tv.mean() <= 0.25
  asap_jax.save(tmp_path / "model", compiled)
  loaded = asap_jax.load(tmp_path / "model", Layer())
  np.testing.assert_allclose(loaded(batches[0]), compiled(batches[0]), atol=1e-5)


def test_too_many_segments_are_named():
  batches = packed_batches()
  batches[1]["segment_ids"] = jnp.asarray(IDS).at[0, 0].set(4)
  with pytest.raises(ValueError, match="as many as max_segments"):
    asap_jax.compile(Layer(), batches, asap_jax.Recipe(slices=2), progress=False)


def test_heads_that_are_packed_apart_are_refused():
  tokens = jnp.ones((2, HEADS, 12, 4))
  ids = jnp.broadcast_to(jnp.asarray(IDS)[:, None], (2, HEADS, 12))
  with pytest.raises(ValueError, match="mask packs 2 heads each in its own way"):
    unpacked(Activation(tokens, tokens, segments=Segments(ids, ids)))


def test_unpacking_takes_tokens_and_bias_along():
  query, key = jax.random.normal(jax.random.key(0), (2, 2, HEADS, 12, 4))
  bias = jax.random.normal(jax.random.key(1), (2, HEADS, 12, 12))
  ids = jnp.asarray(IDS).at[1, -1].set(0)[:, None]
  found = unpacked(Activation(query, key, bias, segments=Segments(ids, ids)))
  assert found.query.shape == (6, HEADS, 8, 4)  # five, and one of padding
  assert found.query_mask.sum(-1)[:, 0].tolist() == [5, 3, 4, 7, 4, 0]
  np.testing.assert_array_equal(found.key[2, :, :4], key[0, :, 8:])
  np.testing.assert_array_equal(found.bias[4, :, :4, :4], bias[1, :, 7:11, 7:11])
  assert not found.query[5].any()


def test_the_call_that_is_timed_is_packed():
  tokens = jax.random.normal(jax.random.key(0), (2, HEADS, 12, 4))
  ids = jnp.asarray(IDS)
  seen = Activation(tokens, tokens, segments=Segments(ids[:, None], ids[:, None]))
  found = attention_call(asap_jax.compiler.Sinkhorn(2), seen)()
  given = jnp.moveaxis(tokens, 1, 2)
  options = {"iterations": 2, "scale": 1.0, "segment_ids": ids}
  wanted = asap_jax.sinkhorn_attention(given, given, given, **options)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
