"""Refinement of dual maps by descent on the KL of plans."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest

import asap_jax
from asap_jax.fidelity import Operator, fidelity_sums
from asap_jax.observe import Observer
from asap_jax.refine import mean_kl, refine, sample_of
from asap_jax.surgery import Activation

KEYS = jax.random.split(jax.random.key(0), 4)
QUERY_MASK = (jnp.arange(7) < jnp.array([[7], [4]]))[:, None]
KEY_MASK = (jnp.arange(6) < jnp.array([[3], [6]]))[:, None]


def activation(masked):
  query = jax.random.normal(KEYS[0], (2, 3, 7, 4))
  key = 2.0 * jax.random.normal(KEYS[1], (2, 3, 6, 4))
  masks = (QUERY_MASK, KEY_MASK) if masked else (None, None)
  return Activation(query, key, None, *masks, None)


def dual_map():
  directions = jax.random.normal(KEYS[2], (3, 2, 4))
  return asap_jax.DualMap(directions, 0.3 * jax.random.normal(KEYS[3], (3, 8)))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_loss_is_the_kl_of_the_plans(masked):
  seen = activation(masked)
  sums = fidelity_sums(seen, Operator("asap", dual_map=dual_map()), 5)
  found = mean_kl(dual_map(), sample_of(seen, 5))
  # The sums are of the plans themselves, entry by entry.
  np.testing.assert_allclose(found, sums.kl.sum() / sums.rows.sum(), rtol=1e-4)


def test_what_lies_at_padding_changes_nothing():
  seen = activation(masked=True)
  filled = seen._replace(
    query=jnp.where(QUERY_MASK[..., None], seen.query, 50.0),
    key=jnp.where(KEY_MASK[..., None], seen.key, -50.0),
  )
  gradients = [
    jax.grad(mean_kl)(dual_map(), sample_of(given, 5)) for given in (seen, filled)
  ]
  for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 1e-4


@pytest.fixture(scope="module")
def samples():
  """Of the toy teacher's first layer: fitted, held out."""
  teacher = Observer(
    models.teacher(), models.batches(), lambda model, batch: model(batch), False
  )

  def record(held_out):
    return [
      sample_of(calls[0][0], models.ITERATIONS)
      for calls in teacher.activations("", held_out=held_out)
    ]

  return record(False), record(True)


def start():
  return models.compiled().model.blocks[0].attention.attention_fn.dual_map


def test_refined_map_is_better_on_held_out_batches(samples):
  result = refine(start(), *samples, steps=40, check_every=10, progress=False)
  before, after = (
    np.mean([mean_kl(which, sample) for sample in samples[1]])
    for which in (start(), result.dual_map)
  )
  np.testing.assert_allclose(result.held_out_kl[0], before, rtol=1e-4)
  np.testing.assert_allclose(min(result.held_out_kl), after, rtol=1e-4)
  assert after < 0.95 * before
  assert not np.allclose(result.dual_map.directions, start().directions)


def test_steps_that_make_it_worse_are_taken_back(samples):
  result = refine(
    start(), *samples, steps=20, learning_rate=30.0, check_every=5, progress=False
  )
  assert max(result.held_out_kl) > result.held_out_kl[0]
  assert result.steps == 0
  np.testing.assert_allclose(result.dual_map.weights, start().weights, rtol=1e-5)
  np.testing.assert_array_equal(result.dual_map.directions, start().directions)


def test_it_stops_when_patience_ends(samples):
  result = refine(
    start(), *samples, steps=50, learning_rate=30.0, check_every=2, patience=3,
    progress=False,
  )  # fmt: skip
  assert len(result.held_out_kl) == 1 + 3


def test_a_kl_that_is_not_finite_is_reported(samples):
  with pytest.warns(UserWarning, match="going back to step 0"):
    result = refine(
      start(), *samples, steps=4, learning_rate=1e38, check_every=1, progress=False
    )
  assert np.isfinite(result.dual_map.weights).all()


def test_the_order_depends_on_the_seed_alone(samples):
  def run(seed):
    return refine(start(), *samples, steps=4, seed=seed, progress=False).dual_map

  first, again, other = run(0), run(0), run(1)
  np.testing.assert_array_equal(first.weights, again.weights)
  np.testing.assert_array_equal(first.directions, again.directions)
  assert not np.array_equal(first.weights, other.weights)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(samples=[], held_out=[1], steps=1), "samples is empty"),
    (dict(samples=[1], held_out=[], steps=1), "held_out is empty"),
    (dict(samples=[1], held_out=[1], steps=0), "steps=0"),
  ],
)
def test_nothing_to_do_is_refused(arguments, message, unchecked):
  with pytest.raises(ValueError, match=message):
    refine(dual_map(), **arguments)


def test_compile_refines_and_never_ends_worse_than_the_ridge_fit():
  model, batches = models.teacher(), models.batches()
  refined = asap_jax.compile(
    model, batches, slices=4, refine_steps=40, progress=False
  ).report
  plain = asap_jax.compile(model, batches, slices=4, progress=False).report
  for better, worse in zip(refined.layers, plain.layers, strict=True):
    assert better.kl.mean() <= worse.kl.mean() + 1e-6
  assert refined.layers[0].kl.mean() < 0.95 * plain.layers[0].kl.mean()
