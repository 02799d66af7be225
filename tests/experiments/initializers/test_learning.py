"""Maps that are learned from problems, against converged transport."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fitting.objective import dual_objective
from experiments.initializers.learning import (
  fit_by_objective,
  fit_by_regression,
  unsliced_map,
)

HEADS, DIM = 2, 3
KEYS = jax.random.split(jax.random.key(0), 2)

value = jax.jit(dual_objective)


def activations(count, seed=0):
  """Problems of one family: clouds around prototypes, as a layer's activations are."""
  random = np.random.default_rng(seed)
  centres = np.random.default_rng(9).normal(size=(2, 4, HEADS, DIM))
  batches = []
  for _ in range(count):
    clouds = []
    for side, size in enumerate((10, 12)):
      kinds = random.integers(4, size=(16, size))
      clouds.append(1.5 * centres[side][kinds])
      clouds[-1] = clouds[-1] + 0.7 * random.normal(size=clouds[-1].shape)
    query, key = (jnp.asarray(c.swapaxes(1, 2), jnp.float32) for c in clouds)
    lengths = random.integers(5, 11, size=(2, 16, 1, 1))
    masks = jnp.arange(10) < lengths[0], jnp.arange(12) < lengths[1]
    batches.append(Activation(query, key, None, *masks))
  return batches


@pytest.fixture(scope="module")
def problems():
  """Fitted on, held out."""
  return activations(4), activations(1, seed=1)


def directions():
  return jax.random.normal(KEYS[0], (HEADS, 3, DIM))


def gap(dual_map, held_out):
  """KL(converged plan || half-closed plan) per row, from converged duals."""
  (seen,) = held_out
  masks = seen.query_mask, seen.key_mask
  f = asap_jax.predict_dual(dual_map, seen.query, seen.key, *masks)
  best = asap_jax.sinkhorn_duals(seen.logits, 300, *masks).f
  short = value(seen.logits, best, *masks) - value(seen.logits, f, *masks)
  return short.sum() / (HEADS * seen.query_mask.sum())


@pytest.mark.slow
def test_regression_is_least_squares_of_converged_duals(problems):
  few = problems[0][:2]
  fitted = fit_by_regression(few, directions(), iterations=300, ridge=1e-9)
  few = jax.tree.map(np.asarray, [(seen, seen.logits) for seen in few])
  slices = np.asarray(directions(), np.float64)
  slices /= np.linalg.norm(slices, axis=-1, keepdims=True)
  for head in range(HEADS):
    rows, targets = [], []
    for (seen, logits), b in itertools.product(few, range(16)):
      weights = [w[b, 0] for w in (seen.query_mask, seen.key_mask)]
      f, _ = oracles.closures(logits[b, head], np.zeros(10), 300, *weights)
      query, key = seen.query[b, head], seen.key[b, head]
      columns = [
        oracles.potentials(query @ theta, key @ theta, *weights)[0][weights[0]]
        for theta in slices[head]
      ]
      rows.append(np.transpose(columns) - np.mean(columns, axis=1))
      f = f[weights[0]]
      targets.append(f - f.mean())
    expected, *_ = np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets))
    np.testing.assert_allclose(fitted.weights[head], expected, rtol=1e-2, atol=1e-3)
    assert np.abs(expected).max() > 0.1


@pytest.mark.slow
def test_objective_needs_no_teacher_and_comes_closer_than_regression(problems):
  fitted = fit_by_regression(problems[0], directions(), iterations=300)
  poor = dataclasses.replace(fitted, weights=jnp.full_like(fitted.weights, DIM / 3))
  options = {"steps": 150, "learning_rate": 2e-2, "progress": False}
  found = fit_by_objective(poor, *problems, **options)
  assert min(found.held_out_kl) < found.held_out_kl[0]
  assert gap(found.dual_map, problems[1]) < gap(fitted, problems[1])
  assert not np.allclose(found.dual_map.directions, poor.directions)


@pytest.mark.slow
def test_a_network_without_slices_learns_from_the_objective(problems):
  zero = unsliced_map(HEADS, DIM)
  seen = problems[0][0]
  masks = seen.query_mask, seen.key_mask
  np.testing.assert_array_equal(
    asap_jax.predict_dual(zero, seen.query, seen.key, *masks), 0.0
  )
  found = fit_by_objective(
    zero, *problems, steps=150, hidden=8, learning_rate=2e-2, progress=False
  )
  assert found.dual_map.network is not None
  assert gap(found.dual_map, problems[1]) < 0.5 * gap(zero, problems[1])
  order = jax.random.permutation(KEYS[1], 10)
  query, query_mask = seen.query[:, :, order], seen.query_mask[..., order]
  moved = Activation(query, seen.key, None, query_mask, seen.key_mask)
  f, turned = (
    asap_jax.predict_dual(found.dual_map, a.query, a.key, a.query_mask, a.key_mask)
    for a in (seen, moved)
  )
  np.testing.assert_allclose(turned, f[..., order], rtol=1e-3, atol=1e-4)


def test_bad_input_is_named(problems):
  with pytest.raises(ValueError, match="activations is empty"):
    fit_by_objective(unsliced_map(HEADS, DIM), [], problems[1], steps=1)
  with pytest.raises(ValueError, match="held_out is empty"):
    fit_by_objective(unsliced_map(HEADS, DIM), problems[0], [], steps=1)
  with pytest.raises(ValueError, match="activations is empty"):
    fit_by_regression([], directions(), iterations=5)
  with pytest.raises(ValueError, match="iterations=0"):
    fit_by_regression(problems[0], directions(), iterations=0)
