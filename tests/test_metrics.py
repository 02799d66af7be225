import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import entropy

from asap_jax import metrics

PERMUTATION = np.eye(5)[[2, 0, 4, 1, 3]]
UNIFORM = np.full((5, 5), 1 / 5)
MASKS = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)


def on_device(array):
  return jnp.asarray(array, jnp.float32)


def random_plans(seed=0):
  """Two row-stochastic plans [batch, heads, n, n], zero at padding."""
  rng = np.random.default_rng(seed)
  plans = []
  for _ in range(2):
    plan = np.exp(2 * rng.normal(size=(2, 3, 6, 6))) * MASKS[:, None, None]
    plans.append(plan / plan.sum(-1, keepdims=True) * MASKS[:, None, :, None])
  return plans


def test_closed_forms_of_permutation_and_uniform_plans():
  permutation, uniform = on_device(PERMUTATION), on_device(UNIFORM)
  for plan, entropies in ((permutation, 0.0), (uniform, np.log(5))):
    np.testing.assert_allclose(metrics.row_error(plan), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(metrics.column_error(plan), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(metrics.row_entropy(plan), entropies, atol=1e-6)
    np.testing.assert_allclose(metrics.attention_sink_share(plan), 1 / 5, rtol=1e-6)
    np.testing.assert_allclose(metrics.total_variation(plan, plan), np.zeros(5))
    np.testing.assert_allclose(metrics.kl_divergence(plan, plan), np.zeros(5))
  apart = metrics.total_variation(permutation, uniform)
  np.testing.assert_allclose(apart, np.full(5, 4 / 5), rtol=1e-6)
  # The reference comes second: KL(permutation || uniform) = log 5.
  apart = metrics.kl_divergence(uniform, permutation)
  np.testing.assert_allclose(apart, np.full(5, np.log(5)), rtol=1e-6)


def test_known_divergence_of_two_coins():
  fair, biased = on_device([[0.5, 0.5]]), on_device([[0.25, 0.75]])
  known = 0.5 * np.log(4 / 3)
  np.testing.assert_allclose(metrics.kl_divergence(biased, fair), [known], rtol=1e-5)
  known = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
  np.testing.assert_allclose(metrics.kl_divergence(fair, biased), [known], rtol=1e-5)
  np.testing.assert_allclose(metrics.total_variation(fair, biased), [0.25])


def test_disjoint_rows_are_far_apart_but_finite():
  plan, reference = on_device([[1.0, 0.0]]), on_device([[0.0, 1.0]])
  np.testing.assert_allclose(metrics.total_variation(plan, reference), [1.0])
  assert 50 < metrics.kl_divergence(plan, reference)[0] < 100


def test_entropy_and_divergence_against_scipy():
  plan, reference = random_plans()
  rows = np.broadcast_to(MASKS[:, None], plan.shape[:-1])
  actual = metrics.row_entropy(on_device(plan))
  np.testing.assert_allclose(actual[rows], entropy(plan[rows], axis=-1), rtol=1e-5)
  np.testing.assert_array_equal(actual[~rows], 0)
  actual = metrics.kl_divergence(on_device(plan), on_device(reference))
  expected = entropy(reference[rows], plan[rows], axis=-1)
  np.testing.assert_allclose(actual[rows], expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(actual[~rows], 0)


def test_pooled_fidelity_is_the_mean_over_heads_and_valid_tokens():
  plan, reference = random_plans(1)
  variation, divergence, columns = [], [], []
  for batch, head in np.ndindex(2, 3):
    valid = np.flatnonzero(MASKS[batch])
    ours, theirs = (p[batch, head][np.ix_(valid, valid)] for p in (plan, reference))
    for row in range(len(valid)):
      variation.append(0.5 * np.abs(ours[row] - theirs[row]).sum())
      divergence.append((theirs[row] * np.log(theirs[row] / ours[row])).sum())
      columns.append(abs(ours[:, row].sum() - 1))
  rows = jnp.asarray(MASKS)[:, None]
  ours, theirs = on_device(plan), on_device(reference)
  for actual, expected in (
    (metrics.total_variation(ours, theirs), variation),
    (metrics.kl_divergence(ours, theirs), divergence),
    (metrics.column_error(ours, rows, rows), columns),
  ):
    pooled = metrics.masked_mean(actual, rows)
    np.testing.assert_allclose(pooled, np.mean(expected), rtol=1e-5)


def test_masked_mean_ignores_what_it_masks_in_value_and_gradient():
  values = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, -jnp.inf]])
  mask = jnp.array([[True, True, False], [True, False, False]])
  mean, slope = jax.value_and_grad(metrics.masked_mean)(values, mask)
  np.testing.assert_allclose(mean, 7 / 3, rtol=1e-6)
  np.testing.assert_allclose(slope, np.asarray(mask) / 3, rtol=1e-6)
  np.testing.assert_allclose(metrics.masked_mean(values[:, 0]), 2.5)
  assert metrics.masked_mean(values, jnp.zeros((2, 3), bool)) == 0


def test_row_error_of_known_sums():
  plan = on_device([[0.5, 0.75], [0.25, 0.25], [0.5, 0.5]])
  np.testing.assert_allclose(metrics.row_error(plan), [0.25, 0.5, 0.0])


@pytest.mark.parametrize("masked", [False, True])
def test_column_error_for_unequal_sizes(masked):
  # Columns of an exact plan sum to n_valid / m_valid; one column is then doubled.
  n, m = (4, 6)
  rows, columns = np.ones(n, bool), np.ones(m, bool)
  if masked:
    rows[1] = columns[[0, 4]] = False
  exact = np.outer(rows, columns) / columns.sum()
  given = (jnp.asarray(rows), jnp.asarray(columns)) if masked else ()
  error = metrics.column_error(on_device(exact), *given)
  np.testing.assert_allclose(error, np.zeros(m), atol=1e-6)
  exact[:, 2] *= 2
  error = metrics.column_error(on_device(exact), *given)
  np.testing.assert_allclose(error, np.arange(m) == 2, atol=1e-6)


def test_attention_sink_takes_its_share():
  plan = np.full((3, 4), 0.1)
  plan[:, 1] = 0.7
  np.testing.assert_allclose(metrics.attention_sink_share(on_device(plan)), 0.7, 1e-6)
  assert metrics.attention_sink_share(jnp.zeros((3, 4))) == 0


@pytest.mark.parametrize("mask", [None, np.array([1, 1, 0, 1, 1], bool)])
def test_rank_residual_against_numpy(mask):
  tokens = np.random.default_rng(0).normal(0.5, size=(5, 3))
  kept = tokens if mask is None else tokens[mask]

  def norm(matrix):
    return np.sqrt(np.linalg.norm(matrix, 1) * np.linalg.norm(matrix, np.inf))

  expected = norm(kept - kept.mean(0)) / norm(kept)
  if mask is not None:
    tokens[~mask] = np.nan
    mask = jnp.asarray(mask)
  actual = metrics.rank_residual(on_device(tokens), mask)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_rank_residual_vanishes_for_equal_tokens_only():
  equal = jnp.ones((4, 3)) * jnp.array([1.0, -2.0, 3.0])
  assert metrics.rank_residual(equal) < 1e-6
  assert metrics.rank_residual(equal.at[0].set(0.0)) > 0.1


def test_gradients_are_finite_at_zeros_of_a_plan():
  plan, mask = on_device(PERMUTATION), jnp.array([True, True, True, True, False])

  @jax.jit
  @jax.grad
  def slope(plan):
    return (
      metrics.total_variation(plan, on_device(PERMUTATION)).sum()
      + metrics.kl_divergence(plan, on_device(PERMUTATION)).sum()
      + metrics.row_error(plan).sum()
      + metrics.column_error(plan, mask, mask).sum()
      + metrics.row_entropy(plan).sum()
      + metrics.attention_sink_share(plan)
    )

  assert jnp.isfinite(slope(plan)).all()
  assert jnp.isfinite(slope(plan * mask[:, None])).all()


def test_gradient_of_the_rank_residual_is_finite_without_residual_or_tokens():
  slope = jax.jit(jax.grad(metrics.rank_residual))
  every = jnp.ones(4, bool)
  assert jnp.isfinite(slope(jnp.ones((4, 3)), every)).all()
  assert jnp.isfinite(slope(jnp.zeros((4, 3)), every)).all()
  np.testing.assert_array_equal(slope(jnp.ones((4, 3)), ~every), 0)


def test_gradients_against_closed_forms():
  plan, reference = random_plans(2)[0][0, 0, 0, :5], random_plans(3)[0][0, 0, 0, :5]
  plan, reference = on_device(plan)[None], on_device(reference)[None]
  slope = jax.grad(lambda p: metrics.kl_divergence(p, reference).sum())(plan)
  np.testing.assert_allclose(slope, -reference / plan, rtol=1e-4)
  slope = jax.grad(lambda p: metrics.row_entropy(p).sum())(plan)
  np.testing.assert_allclose(slope, -np.log(plan) - 1, rtol=1e-4, atol=1e-5)


def test_batches_and_vmap_agree():
  plan, reference = (on_device(p) for p in random_plans(4))
  for function in (metrics.total_variation, metrics.kl_divergence):
    mapped = jax.vmap(jax.vmap(function))(plan, reference)
    np.testing.assert_allclose(mapped, function(plan, reference), atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "masks", "masses"])
def test_means_of_many_values_show_the_column_error(kind):
  rng = np.random.default_rng(0)
  mask = np.arange(12) < 9
  if kind == "masses":
    masses = np.where(mask, rng.uniform(0.9, 1.1, size=12), 0.0)
  else:
    masses = mask * 1.0 if kind == "masks" else np.ones(12)
  b = masses / masses.sum()
  plan = np.exp(rng.normal(size=(12, 12))) * (masses > 0) * (masses > 0)[:, None]
  plan /= np.maximum(plan.sum(-1, keepdims=True), 1e-30)
  valid = b > 0
  # Relative errors of the columns, independent of so many random values.
  errors = plan.sum(0)[valid] / (valid.sum() * b[valid]) - 1.0
  values = rng.normal(size=(12, 20000))
  values[~valid] = np.nan
  output = plan @ np.where(valid[:, None], values, 0.0)
  output[~valid] = np.inf
  given = None if kind == "full" else jnp.asarray(mask if kind == "masks" else masses)
  query_mask = None if kind == "full" else jnp.asarray(mask)
  tokens = on_device(values), on_device(output)
  found = metrics.column_error_of_means(*tokens, query_mask, given)
  expected = np.sqrt((errors**2).mean())
  np.testing.assert_allclose(found, expected, rtol=0.05 if kind == "masses" else 0.02)


def test_means_of_an_exact_plan_show_no_error():
  values = jax.random.normal(jax.random.key(0), (3, 5, 4))
  found = metrics.column_error_of_means(values, on_device(PERMUTATION) @ values)
  np.testing.assert_allclose(found, 0.0, atol=1e-5)
  alike = jnp.ones((5, 4))
  assert metrics.column_error_of_means(alike, alike) == 0.0
