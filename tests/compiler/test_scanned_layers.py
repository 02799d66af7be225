"""Models that keep their layers stacked and run them with `nnx.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

import asap_jax

pytestmark = pytest.mark.slow
OPTIONS = {"slices": 4, "hidden": 4, "refine_steps": 2}


class Stacked(nnx.Module):
  def __init__(self, depth, rngs):
    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def create(rngs):
      return models.Block(models.WIDTH, rngs)

    self.blocks = create(rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
      return block(x)

    return run(x, self.blocks)


@pytest.fixture(scope="module")
def stacked():
  return Stacked(2, nnx.Rngs(0))


@pytest.fixture(scope="module")
def compiled(stacked):
  return models.compile_recipe(stacked, models.batches(), **OPTIONS)


def unstacked(stacked):
  """The same layers in a list."""
  model = models.toy()
  graph, state = nnx.split(stacked.blocks)
  for index, _ in enumerate(model.blocks):
    layer = jax.tree.map(lambda leaf, index=index: leaf[index], state)
    model.blocks[index] = nnx.merge(graph, layer)
  return model


def test_every_layer_is_calibrated_as_it_would_be_alone(stacked, compiled):
  expected = models.compile_recipe(unstacked(stacked), models.batches(), **OPTIONS)
  names = [layer.name for layer in compiled.report.layers]
  assert names == ["blocks.attention[0]", "blocks.attention[1]"]
  for found, wanted in zip(compiled.report.layers, expected.report.layers, strict=True):
    np.testing.assert_allclose(found.tv, wanted.tv, rtol=1e-2)
  x = models.batches()[1]
  np.testing.assert_allclose(compiled.model(x), expected.model(x), atol=2e-3)


def test_saved_and_loaded_it_is_the_same(compiled, tmp_path):
  asap_jax.save(tmp_path / "model", compiled.model)
  loaded = asap_jax.load(tmp_path / "model", Stacked(2, nnx.Rngs(7)))
  x = models.batches()[0]
  np.testing.assert_array_equal(loaded(x), compiled.model(x))


def test_attention_shared_between_mapped_inputs_is_refused_with_a_reason():
  class Mapped(nnx.Module):
    def __init__(self):
      self.block = models.Block(models.WIDTH, nnx.Rngs(0))

    def __call__(self, x):
      return nnx.vmap(lambda block, x: block(x[None])[0], in_axes=(None, 0))(
        self.block, x
      )

  model = Mapped()
  assert jnp.isfinite(model(models.batches()[0])).all()
  with pytest.raises(ValueError, match="transformation that shares it"):
    models.compile_recipe(model, models.batches(), **OPTIONS)
