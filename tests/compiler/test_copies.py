"""Compiled models are copied, pickled and switched as any other."""

import copy
import pickle

import jax
import numpy as np
import pytest
from helpers import models

import asap_jax

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled():
  recipe = asap_jax.Recipe(slices=2, refine_steps=0)
  model, _ = asap_jax.compile(
    models.toy(depth=1), models.batches(), recipe, progress=False
  )
  return model


@pytest.mark.parametrize(
  "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_is_the_same_model_and_another_object(compiled, copied):
  tokens = models.batches()[0]
  other = copied(compiled)
  np.testing.assert_array_equal(other(tokens), compiled(tokens))
  weights = other.blocks[0].attention.attention_fn.parameters["weights"]
  weights[...] = weights[...] + 1.0
  assert not np.allclose(other(tokens), compiled(tokens))


def test_a_fitted_function_is_pickled():
  batches = jax.random.normal(jax.random.key(0), (2, 4, 6, 2, 4))
  calls = [asap_jax.AttentionCall(each, each) for each in batches]
  recipe = asap_jax.Recipe(slices=2, refine_steps=0)
  attend = asap_jax.fit(calls, recipe, progress=False).attention_fn
  other = pickle.loads(pickle.dumps(attend))
  found, wanted = (each(*(batches[0],) * 3) for each in (other, attend))
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_mode_is_kept(mode):
  model = models.toy(depth=1, dropout_rate=0.5)
  getattr(model, mode)()
  cut = asap_jax.compiler.Sinkhorn(2)
  compiled, _ = asap_jax.compile(model, models.batches(), cut, progress=False)
  own, other = (m.blocks[0].attention.deterministic for m in (compiled, model))
  assert own == other == (mode == "eval")
