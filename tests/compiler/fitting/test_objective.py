"""Maps fitted by the dual objective, against converged transport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import (
  KEY_MASK,
  QUERY_MASK,
  WEIGHTS,
  M,
  N,
  on_device,
  random_logits,
)

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fitting.descent import mean_kl
from asap_jax.compiler.fitting.objective import (
  dual_objective,
  objective_sample,
)

LOGITS, F = random_logits()
HEADS, DIM = 2, 3
KEYS = jax.random.split(jax.random.key(0), 4)

value = jax.jit(dual_objective)
slope = jax.jit(jax.grad(dual_objective, argnums=1))


def primal(plan, logits):
  present = plan > 0
  entries = plan[present]
  return np.sum(entries * (np.log(entries) - np.asarray(logits, np.float64)[present]))


@pytest.mark.parametrize("name", WEIGHTS)
def test_objective_is_below_the_primal_by_the_kl_of_the_plans(name):
  weights = WEIGHTS[name]
  best = oracles.plan(LOGITS, *oracles.closures(LOGITS, F, 2000, *weights), *weights)
  found = value(LOGITS, F, *on_device(weights))
  # The plan of f and its c-transform, whose columns are exact: half a closure.
  rows, columns = (oracles.present(w, s) for w, s in zip(weights, (N, M), strict=True))
  _, g = oracles.closures(LOGITS, F, 1, *weights)
  own = oracles.plan(LOGITS, np.asarray(F, np.float64), g, *weights)
  at = np.ix_(rows, columns)
  gap = np.sum(best[at] * np.log(best[at] / own[at]))
  np.testing.assert_allclose(found, primal(best, LOGITS) - gap, rtol=1e-4, atol=1e-4)
  assert gap > 0.05


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_is_the_error_of_the_row_sums(name):
  weights = WEIGHTS[name]
  _, g = oracles.closures(LOGITS, F, 1, *weights)
  own = oracles.plan(LOGITS, np.asarray(F, np.float64), g, *weights)
  expected = np.zeros(N)
  expected[oracles.present(weights[0], N)] = oracles.plan_sums(*weights, N, M)[0]
  expected = expected - own.sum(1)
  found = slope(LOGITS, F, *on_device(weights))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_absent_points_and_constants_change_nothing():
  masks = on_device((QUERY_MASK, KEY_MASK))
  holes = jnp.where(masks[0][:, None] & masks[1], LOGITS, jnp.nan)
  f = jnp.where(masks[0], F, jnp.nan)
  np.testing.assert_array_equal(value(holes, f, *masks), value(LOGITS, F, *masks))
  found = slope(holes, f, *masks)
  np.testing.assert_array_equal(found, slope(LOGITS, F, *masks))
  np.testing.assert_array_equal(found[~masks[0]], 0.0)
  moved = value(LOGITS, F + 3.0, *masks)
  np.testing.assert_allclose(moved, value(LOGITS, F, *masks), rtol=1e-5)


def test_batches_share_a_dual_and_low_precision_is_raised():
  batch = jnp.stack([LOGITS, 2.0 * LOGITS])
  found = value(batch, F)
  for index in range(2):
    np.testing.assert_allclose(found[index], value(batch[index], F), rtol=1e-6)
  low = value(LOGITS.astype(jnp.bfloat16), F.astype(jnp.bfloat16))
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, value(LOGITS, F), rtol=0.05)


def activations(count, masked, seed=0):
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
    masks = (None, None)
    if masked:
      lengths = random.integers(5, 11, size=(2, 16, 1, 1))
      masks = jnp.arange(10) < lengths[0], jnp.arange(12) < lengths[1]
    batches.append(Activation(query, key, None, *masks, None))
  return batches


@pytest.mark.slow
@pytest.mark.parametrize(
  "masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "masked"]
)
def test_loss_of_a_sample_is_minus_the_objective_of_the_closed_dual(masked):
  (seen,) = activations(1, masked)
  dual_map = asap_jax.DualMap(
    jax.random.normal(KEYS[0], (HEADS, 2, DIM)),
    0.3 * jax.random.normal(KEYS[1], (HEADS, 2 + DIM + 2)),
  )
  masks = seen.query_mask, seen.key_mask
  f = asap_jax.predict_dual(dual_map, seen.query, seen.key, *masks)
  logits, f = np.asarray(seen.logits), np.asarray(f)
  total, rows = 0.0, 0
  for b, h in np.ndindex(16, HEADS):
    weights = [w if w is None else np.asarray(w[b, 0]) for w in masks]
    closed, g = oracles.closures(logits[b, h], f[b, h], 1, *weights)
    row_sums, column_sums = oracles.plan_sums(*weights, 10, 12)
    columns = g[oracles.present(weights[1], 12)]
    total += closed.sum() + column_sums @ columns
    rows += len(row_sums)
  found = jax.jit(mean_kl)(dual_map, objective_sample(seen))
  np.testing.assert_allclose(found, -total / rows, rtol=1e-4)
