import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

compile = functools.partial(models.compile_recipe, refine_steps=0)


@pytest.fixture(scope="module")
def model():
  return models.toy(depth=1)


def test_model_without_sinkhorn_attention_is_refused(model):
  flax = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"holds no Sinkhorn attention"):
    compile(flax, models.batches())
  with pytest.raises(ValueError, match=r"holds no Sinkhorn attention"):
    compile(models.compiled().model, models.batches())


@pytest.mark.parametrize("directions", ["principal", "gaussian"])
def test_too_few_batches_are_refused(model, directions):
  run = functools.partial(compile, model, slices=2, directions=directions)
  with pytest.raises(ValueError, match=r"batches is empty.*at least two"):
    run([])
  with pytest.raises(ValueError, match=r"single batch.*at least two"):
    run(models.batches()[:1])


def test_too_few_tokens_are_refused_with_the_layer_named(model):
  # One sequence of ten tokens for 8 + 8 + 2 features.
  few = [x[:1] for x in models.batches()[:2]]
  message = r"blocks\.0\.attention: statistics hold 10 tokens for 34 features"
  with pytest.raises(ValueError, match=message):
    compile(model, few)


@pytest.mark.parametrize("index", [0, 1], ids=["fitted", "held out"])
def test_activations_that_are_not_finite_are_refused(model, index):
  spoilt = list(models.batches()[:3])
  spoilt[index] = spoilt[index].at[0, 0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match=r"blocks\.0\.attention: .*not finite"):
    compile(model, spoilt, 2)


def test_attention_that_is_never_called_is_refused():
  model = models.toy()
  with pytest.raises(
    ValueError, match=r"blocks\.1\.attention: .*no call of this attention was seen"
  ):
    compile(
      model, models.batches()[:2], 2, call=lambda model, batch: model.blocks[0](batch)
    )


def test_mask_that_is_no_product_is_refused(model):
  mask = nnx.make_causal_mask(jnp.ones((16, models.TOKENS)))
  masked = [(x, mask) for x in models.batches()[:2]]
  with pytest.raises(ValueError, match=r"blocks\.0\..*: .*not the outer product"):
    compile(model, masked, 2, call=lambda model, batch: model(*batch))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"slices": 0}, "slices=0: expected at least 1"),
    ({"features": ("sorted",)}, "expected some of"),
    ({"ridge": 0.0}, "ridge=0.*positive"),
  ],
)
def test_options_that_make_no_sense_are_refused(model, options, message):
  with pytest.raises(ValueError, match=message):
    compile(model, models.batches()[:2], **({"slices": 2} | options))


@pytest.mark.usefixtures("unchecked")
def test_unknown_directions_are_refused(model):
  with pytest.raises(ValueError, match=r"directions='sobol': expected .*orthogonal"):
    compile(model, models.batches()[:2], 2, directions="sobol")


def test_teacher_is_unchanged_by_a_failure(model):
  with pytest.raises(ValueError, match=r"not finite"):
    compile(model, [jnp.full_like(x, np.nan) for x in models.batches()[:2]], 2)
  models.assert_same_state(model, models.toy(depth=1))
