"""Refinement of dual maps by descent on the KL of plans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import models

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fidelity import fidelity_sums
from asap_jax.compiler.fitting.descent import Refiner, mean_kl, refine
from asap_jax.compiler.fitting.samples import minibatches, pooled, sample_of
from asap_jax.compiler.fitting.scales import add_network
from asap_jax.compiler.operators import Asap, Sinkhorn
from asap_jax.compiler.recording import Observer

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


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_loss_is_the_kl_of_the_plans(masked):
  seen = activation(masked)
  (sums,) = fidelity_sums(seen, [Asap(dual_map())], Sinkhorn(5))
  found = mean_kl(dual_map(), sample_of(seen, Sinkhorn(5)))
  # The sums are of the plans themselves, entry by entry.
  np.testing.assert_allclose(found, sums.kl.sum() / sums.rows.sum(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 6])
def test_what_lies_at_padding_changes_nothing(hidden):
  seen = activation(masked=True)
  filled = dataclasses.replace(
    seen,
    query=jnp.where(QUERY_MASK[..., None], seen.query, 50.0),
    key=jnp.where(KEY_MASK[..., None], seen.key, -50.0),
  )
  held = dual_map()
  if hidden:
    held = add_network(held, sample_of(seen, Sinkhorn(5)), hidden, jax.random.key(0))
    output = jax.random.normal(KEYS[0], (3, hidden))
    held = dataclasses.replace(
      held, network=dataclasses.replace(held.network, output=output)
    )
  samples = [sample_of(given, Sinkhorn(5)) for given in (seen, filled)]
  gradients = [jax.grad(mean_kl)(held, sample) for sample in samples]
  for found, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_array_equal(found, expected)
  assert np.abs(gradients[0].weights).max() > 1e-4


@pytest.fixture(scope="module")
def samples():
  """Of the toy teacher's first layer: fitted, held out."""
  teacher = Observer(
    models.teacher(), models.batches(), lambda model, batch: model(batch), False
  )

  def record(held_out):
    return pooled(
      jax.device_get(sample_of(calls[0][0], Sinkhorn(models.ITERATIONS)))
      for calls in teacher.activations("", held_out=held_out)
    )

  return record(False), record(True)


def linear():
  return models.compiled().model.blocks[0].attention.attention_fn.dual_map


def start(samples, kind):
  """A ridge fit, with what `kind` adds to it."""
  if kind == "network":
    return add_network(linear(), samples[0][0], 8, jax.random.key(0))
  if kind == "closures":
    return dataclasses.replace(linear(), relaxation=jnp.ones((models.HEADS, 1)))
  return linear()


kl = jax.jit(mean_kl)

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("network", "closures")]
KINDS = pytest.mark.parametrize("kind", ["linear", *SLOW])


@pytest.mark.slow
@KINDS
def test_refined_map_is_better_on_held_out_batches(samples, kind):
  begun = start(samples, kind)
  result = refine(begun, *samples, steps=60, learning_rate=2e-2, progress=False)
  before, after = (
    np.mean([kl(which, sample) for sample in samples[1]])
    for which in (begun, result.dual_map)
  )
  np.testing.assert_allclose(result.held_out_kl[0], before, rtol=1e-4)
  np.testing.assert_allclose(min(result.held_out_kl), after, rtol=1e-4)
  assert after < 0.95 * before
  assert not np.allclose(result.dual_map.directions, begun.directions)
  if kind == "closures":
    assert np.abs(result.dual_map.relaxation - 1.0).min() > 1e-3
  if kind == "network":
    network, fresh = result.dual_map.network, begun.network
    np.testing.assert_array_equal(network.context_shift, fresh.context_shift)
    assert np.abs(network.output).max() > 0.0


@pytest.mark.slow
def test_a_fresh_network_changes_no_prediction(samples):
  sample = samples[0][0]
  grown = start(samples, "network")
  assert grown.network.output.shape == (models.HEADS, 8)
  np.testing.assert_allclose(kl(grown, sample), kl(linear(), sample), rtol=1e-6)


@pytest.mark.slow
def test_a_single_kind_of_feature_may_have_a_network(samples):
  only = asap_jax.DualMap(
    linear().directions, jnp.zeros((models.HEADS, 2)), ("cumulants",)
  )
  grown = add_network(only, samples[0][0], 8, jax.random.key(0))
  result = refine(grown, *samples, steps=20, learning_rate=2e-2, progress=False)
  assert min(result.held_out_kl) < 0.99 * result.held_out_kl[0]


def test_steps_that_make_it_worse_are_taken_back(samples):
  result = refine(linear(), *samples, steps=20, learning_rate=30.0, progress=False)
  assert max(result.held_out_kl) > result.held_out_kl[0]
  assert result.steps == 0
  np.testing.assert_array_equal(result.dual_map.weights, linear().weights)
  np.testing.assert_array_equal(result.dual_map.directions, linear().directions)


def test_it_stops_when_patience_ends(samples):
  result = refine(
    linear(), *samples, steps=60, learning_rate=30.0, patience=3, progress=False
  )
  assert len(result.held_out_kl) == 1 + 3


def test_a_kl_that_is_not_finite_is_reported(samples):
  with pytest.warns(UserWarning, match="going back to step 0"):
    result = refine(linear(), *samples, steps=4, learning_rate=1e38, progress=False)
  assert np.isfinite(result.dual_map.weights).all()


@pytest.mark.slow
@KINDS
def test_the_result_depends_on_the_seed_alone(samples, kind):
  def run(seed):
    return refine(
      start(samples, kind), *samples, steps=4, batch_size=8, seed=seed, progress=False
    ).dual_map

  first, again, other = run(0), run(0), run(1)
  for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(one, two)
  assert not np.array_equal(first.weights, other.weights)


def test_samples_in_parts_continue_one_descent(samples):
  pools, held_out = samples
  halves = [
    [jax.tree.map(lambda leaf, half=half: leaf[half], pool) for pool in pools]
    for half in (slice(None, 32), slice(32, None))
  ]
  refiner = Refiner(
    linear(), halves[0], held_out, steps=40, patience=20, progress=False
  )
  refiner.run(halves[0], 20)
  assert not refiner.finished
  between = refiner.result.held_out_kl
  assert len(between) == 1 + 10
  refiner.run(halves[1], 40)
  assert refiner.finished
  after = refiner.result.held_out_kl
  assert len(after) == 1 + 20
  assert after[:11] == between
  # The schedule went on: a start anew would warm up, and move less.
  assert abs(after[11] - after[10]) > 0.0


def test_minibatches_pass_over_all_sequences():
  whole, other = (
    sample_of(dataclasses.replace(activation(False), bias=None), Sinkhorn(2)),
    sample_of(
      Activation(
        jax.random.normal(KEYS[0], (4, 3, 5, 4)),
        jax.random.normal(KEYS[1], (4, 3, 5, 4)),
        *[None] * 4,
      ),
      Sinkhorn(2),
    ),
  )
  pools = pooled([jax.device_get(s) for s in (whole, other, whole)])
  assert sorted(pool.size for pool in pools) == [4, 4]
  batches = minibatches(pools, 2, np.random.default_rng(0))
  seen = [next(batches) for _ in range(4)]
  shapes = sorted(batch.activation.query.shape for batch in seen)
  assert shapes == [(2, 3, 5, 4)] * 2 + [(2, 3, 7, 4)] * 2
  total = sum(batch.constant.sum() for batch in seen)
  np.testing.assert_allclose(total, sum(p.constant.sum() for p in pools), rtol=1e-6)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(pools=[], held_out=[1], steps=1), "pools is empty"),
    (dict(pools=[1], held_out=[], steps=1), "held_out is empty"),
    (dict(pools=[1], held_out=[1], steps=0), "steps=0"),
  ],
)
def test_nothing_to_do_is_refused(arguments, message, unchecked):
  with pytest.raises(ValueError, match=message):
    refine(dual_map(), **arguments)


@pytest.mark.slow
def test_compile_refines_and_never_ends_worse_than_the_ridge_fit():
  model, batches = models.teacher(), models.batches()
  refined = models.compile_recipe(
    model, batches, slices=4, refine_steps=60, hidden=8
  ).report
  plain = models.compile_recipe(model, batches, slices=4, refine_steps=0).report
  for better, worse in zip(refined.layers, plain.layers, strict=True):
    assert better.kl.mean() <= worse.kl.mean() + 1e-6
  assert refined.layers[0].kl.mean() < 0.95 * plain.layers[0].kl.mean()
