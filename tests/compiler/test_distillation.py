"""Distilling compiled models end to end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

import asap_jax
from asap_jax import DualParam
from asap_jax.compiler.distillation import output_error
from asap_jax.dual_map.features import FEATURES

distil = functools.partial(asap_jax.distil, progress=False)
HELD_OUT = 1  # of the toy teacher's six batches


@functools.cache
def distilled():
  """The toy model after a few steps, shared by tests that only look at it."""
  model, teacher = models.compiled().model, models.teacher()
  return distil(model, teacher, models.batches(), 150, check_every=25)


def held_out_error(model):
  """Share of the variance of the teacher's outputs that is missed, in NumPy."""
  x = models.batches()[HELD_OUT]
  found, expected = (
    np.float64(models.forward(of, x)) for of in (model, models.teacher())
  )
  return ((found - expected) ** 2).mean() / expected.var()


@pytest.mark.slow
def test_outputs_come_closer_on_held_out_batches():
  result, start = distilled(), models.compiled().model
  np.testing.assert_allclose(result.held_out_loss[0], held_out_error(start), rtol=1e-3)
  np.testing.assert_allclose(
    min(result.held_out_loss), held_out_error(result.model), rtol=1e-3
  )
  assert min(result.held_out_loss) < 0.9 * result.held_out_loss[0]
  assert (result.batches, len(result.held_out_loss)) == (5, 7)
  assert result.steps == 25 * int(np.argmin(result.held_out_loss))


@pytest.mark.slow
def test_only_dual_maps_change_and_only_in_the_copy():
  before = models.compiled().model
  copy = [np.array(leaf) for leaf in models.arrays(before)]
  result = distilled.__wrapped__().model
  for found, expected in zip(models.arrays(before), copy, strict=True):
    np.testing.assert_array_equal(found, expected)
  models.assert_same_state(models.teacher(), models.toy())
  old, new = (dict(nnx.to_flat_state(nnx.state(m))) for m in (before, result))
  assert old.keys() == new.keys()
  changed = {path for path in old if not np.array_equal(old[path][...], new[path][...])}
  assert changed == {path for path in old if isinstance(old[path], DualParam)}


@pytest.mark.slow
def test_steps_that_make_it_worse_are_taken_back():
  start = models.compiled().model
  result = distil(
    start, models.teacher(), models.batches(), 6, learning_rate=30.0, check_every=2
  )
  assert max(result.held_out_loss) > result.held_out_loss[0]
  assert result.steps == 0
  models.assert_same_state(result.model, start)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_reported():
  start = models.compiled().model
  with pytest.warns(UserWarning, match="going back to step 0"):
    result = distil(
      start, models.teacher(), models.batches(), 4, learning_rate=1e38, check_every=1
    )
  assert np.isfinite(result.held_out_loss).all()
  models.assert_same_state(result.model, start)


@pytest.mark.slow
def test_the_result_depends_on_the_seed_alone():
  run = functools.partial(
    distil, models.compiled().model, models.teacher(), models.batches(), 3
  )
  first, again, other = (run(seed=seed) for seed in (0, 0, 1))
  models.assert_same_state(first.model, again.model)
  assert first.held_out_loss == again.held_out_loss
  assert first.held_out_loss[1:] != other.held_out_loss[1:]


@pytest.mark.slow
def test_what_lies_at_padding_changes_nothing():
  valid = jnp.arange(models.TOKENS + 2) < models.TOKENS
  mask = nnx.make_attention_mask(*2 * [jnp.broadcast_to(valid, (16, len(valid)))])

  def call(model, x):
    return {"tokens": jnp.where(valid[:, None], model(x, mask), 0.0)}

  run = functools.partial(
    distil, models.compiled().model, models.teacher(), steps=2, call=call
  )
  first, other = (
    run(
      [
        jnp.pad(x, ((0, 0), (0, 2), (0, 0)), constant_values=filling)
        for x in models.batches()[:3]
      ]
    )
    for filling in (0.0, 50.0)
  )
  assert first.steps == 2
  models.assert_same_state(first.model, other.model)


@pytest.mark.slow
def test_dropout_is_off_and_the_mode_of_the_model_stays():
  teacher = models.toy(dropout_rate=0.5)
  batches = models.batches()[:3]
  model, _ = models.compile_recipe(
    teacher, batches, 4, features=FEATURES, refine_steps=0
  )
  result = distil(model, teacher, batches, 1)
  assert not result.model.blocks[0].attention.deterministic
  found, expected = (
    np.float64(models.forward(nnx.view(of, deterministic=True), batches[HELD_OUT]))
    for of in (model, teacher)
  )
  error = ((found - expected) ** 2).mean() / expected.var()
  np.testing.assert_allclose(result.held_out_loss[0], error, rtol=1e-3)


@pytest.mark.slow
def test_batches_can_be_read_once_and_are_kept_up_to_a_limit(monkeypatch):
  monkeypatch.setattr("asap_jax.compiler.distillation._CACHE_BYTES", 1)
  source = iter(models.batches())
  result = distil(models.compiled().model, models.teacher(), source, 1)
  assert result.batches == 1
  assert len(list(source)) == 4


def test_error_of_a_tree_is_the_mean_over_its_floating_arrays():
  random = np.random.default_rng(0)
  a, b, c, d = random.normal(size=(4, 3, 5)).astype(np.float32) * 2
  found = {"a": a, "b": [b, jnp.arange(3)], "constant": jnp.full(4, 3.0)}
  expected = {"a": c, "b": [d, jnp.ones(3, int)], "constant": jnp.full(4, 1.0)}
  parts = [((x - y) ** 2).mean() / y.var() for x, y in ((a, c), (b, d))]
  value = jax.jit(output_error)(found, jax.tree.map(jnp.asarray, expected))
  np.testing.assert_allclose(value, np.mean([*parts, 4.0]), rtol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"steps": 0}, "steps=0: expected a positive number"),
    ({"learning_rate": 0.0}, r"learning_rate=0\.0: expected a positive"),
    ({"check_every": 0}, "check_every=0: expected a positive"),
    ({"model": models.teacher()}, "model holds no DualParam"),
    ({"batches": []}, "batches holds 0: expected at least two"),
    ({"batches": models.batches()[:1]}, "batches holds 1: expected at least two"),
    ({"batches": [jnp.full((2, 10, 16), jnp.nan)] * 2}, "teacher: .*not finite"),
    ({"call": lambda model, x: model(x).argmax(-1)}, "at least one floating array"),
    (
      {"call": lambda model, x: model(x)[: 1 + len(nnx.state(model, DualParam))]},
      r"outputs are .*expected the teacher's",
    ),
  ],
)
def test_what_cannot_be_distilled_is_refused(options, message):
  arguments = {
    "model": models.compiled().model,
    "teacher": models.teacher(),
    "batches": models.batches()[:2],
    "steps": 1,
  }
  with pytest.raises(ValueError, match=message):
    distil(**(arguments | options))


@pytest.mark.slow
def test_every_parameter_of_a_map_with_network_and_relaxation_is_trained():
  teacher, batches = models.toy(depth=1), models.batches()[:3]
  model, _ = models.compile_recipe(teacher, batches, 2, closures=2, refine_steps=2)
  result = distil(model, teacher, batches, 20, check_every=5)
  assert min(result.held_out_loss) < result.held_out_loss[0]
  old, new = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, result.model))
  dual = {path for path in old if isinstance(old[path], DualParam)}
  assert len(dual) > 4  # directions, weights, relaxation and a network's arrays
  changed = {path for path in old if not np.array_equal(old[path][...], new[path][...])}
  # The network's origin is a constant.
  assert changed == {path for path in dual if path[-1] != "network_context_shift"}
