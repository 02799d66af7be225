"""The dual of sliced potentials against float64, exact transport and Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import KEY_MASK, QUERY_MASK, WEIGHTS, M, N, on_device

from asap_jax.potentials.summed import paired_bases, sliced_start

DIM = 3
KEYS = jax.random.split(jax.random.key(0), 5)
SKEW = jnp.array([[1.0, 0.4, 0.0], [0.0, 1.0, -0.7], [0.3, 0.0, 0.5]])
QUERY = jax.random.normal(KEYS[0], (N, DIM)) @ SKEW + 0.5
KEY = 1.5 * jax.random.normal(KEYS[1], (M, DIM)) @ SKEW.T - 0.2
DIRECTIONS = jax.random.orthogonal(KEYS[2], DIM)

start = jax.jit(sliced_start, static_argnames="entropic")
canonical = jax.jit(paired_bases)


def moments(points, weights):
  """Mass, mean and covariance, float64."""
  mass = np.array(oracles.masses(weights, len(points)), np.float64)
  points = np.asarray(points, np.float64)
  centred = points - mass @ points
  return mass, mass @ points, (centred * mass[:, None]).T @ centred


def reference(query, key, weights, bases, entropic=True, share=1.0):
  """The formula of the docstring, one slice at a time."""
  a, at_query, _ = moments(query, weights[0])
  b, at_key, _ = moments(key, weights[1])
  query, key = (np.asarray(points, np.float64) for points in (query, key))
  f = -query @ at_key
  for u, v in zip(*np.asarray(bases, np.float64), strict=True):
    x, y = (query - at_query) @ u, (key - at_key) @ v
    rho = 1.0
    if entropic:
      k = 1.0 / (2.0 * np.sqrt((a @ x**2) * (b @ y**2)))
      rho = np.sqrt(1.0 + k**2) - k
    f = f + share * rho * oracles.potentials(x, y, *weights)[0]
  return (f - a @ f) * (a > 0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_canonical_slices_make_both_clouds_uncorrelated(name):
  weights = WEIGHTS[name]
  u, v = np.asarray(canonical(QUERY, KEY, *on_device(weights)), np.float64)
  np.testing.assert_allclose(u.T @ v, np.eye(DIM), atol=1e-4)
  of_query, of_key = (
    basis @ moments(points, w)[2] @ basis.T
    for basis, points, w in zip((u, v), (QUERY, KEY), weights, strict=True)
  )
  np.testing.assert_allclose(of_query, np.eye(DIM), atol=1e-3)
  np.testing.assert_allclose(of_key, np.diag(np.diag(of_key)), atol=1e-3)


def test_principal_slices_are_eigenvectors_of_both_covariances():
  u, v = paired_bases(QUERY, KEY, kind="principal")
  np.testing.assert_array_equal(u, v)
  both = sum(
    s / np.trace(s) for s in (moments(points, None)[2] for points in (QUERY, KEY))
  )
  turned = np.asarray(u) @ both @ np.asarray(u).T
  np.testing.assert_allclose(turned, np.diag(np.linalg.eigvalsh(both)), atol=1e-5)


@pytest.mark.parametrize(
  "entropic", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", WEIGHTS)
def test_start_is_the_formula_in_float64(name, entropic):
  weights = WEIGHTS[name]
  found = start(QUERY, KEY, *on_device(weights), entropic=entropic)
  bases = canonical(QUERY, KEY, *on_device(weights))
  expected = reference(QUERY, KEY, weights, bases, entropic)
  np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_given_directions_are_averaged_over_the_sphere():
  four = jnp.concatenate([DIRECTIONS, DIRECTIONS[:1]])
  weights = WEIGHTS["masses"]
  found = start(QUERY, KEY, *on_device(weights), slices=four)
  expected = reference(QUERY, KEY, weights, (four, four), share=DIM / 4)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def dual_value(f, costs):
  """Of f and its c-transform, equal masses."""
  f = np.asarray(f, np.float64)
  return f.mean() + (costs - f[:, None]).min(0).mean()


@pytest.mark.parametrize("slices", ["canonical", "principal", "directions"])
def test_potentials_are_exact_where_transport_is_affine(slices):
  # The map x -> Ax with A positive definite is optimal; it does not commute with the
  # covariance of x, so that of all bases the canonical one alone is exact.
  query = jax.random.normal(KEYS[3], (40, DIM)) @ SKEW
  moved = query @ (SKEW @ SKEW.T + 0.2 * jnp.eye(DIM)) + 1.0
  costs = -np.asarray(query, np.float64) @ np.asarray(moved, np.float64).T
  equal = np.full(40, 1.0 / 40)
  best = oracles.transport_cost(costs, equal, equal)
  kind = DIRECTIONS if slices == "directions" else slices
  found = sliced_start(query, moved, slices=kind, entropic=False)
  gap = best - dual_value(found, costs)
  scale = np.ptp(costs)
  assert gap > -1e-5 * scale  # weak duality
  if slices == "canonical":
    assert gap < 3e-5 * scale
  else:
    assert gap > 3e-4 * scale


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_entropic_start_is_the_dual_of_gaussians(scale):
  # Two Gaussians on grids; logits from blurred to sharp.
  x, y = np.linspace(-4, 4, 81), np.linspace(-4, 4, 101)
  a, b = np.exp(-(x**2) / 2), np.exp(-(y**2) / 2)
  logits = scale * np.outer(x, y + 0.5)
  f, _ = oracles.closures(logits, np.zeros(len(x)), 300, a, b)
  a = a / a.sum()
  expected = f - np.log(a)
  expected -= a @ expected
  weights = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  points = [jnp.asarray(z, jnp.float32)[:, None] for z in (scale * x, y + 0.5)]
  plain, found = (start(*points, *weights, entropic=e) for e in (False, True))
  spread = np.sqrt(a @ expected**2)
  error = np.sqrt(a @ (np.asarray(found) - expected) ** 2)
  assert error < 0.03 * spread
  if scale < 10:
    assert error < 0.2 * np.sqrt(a @ (np.asarray(plain) - expected) ** 2)


def test_absent_points_may_hold_anything():
  weights = on_device((QUERY_MASK, KEY_MASK))
  query, key = (
    jnp.where(mask[:, None], points, jnp.nan)
    for mask, points in zip(weights, (QUERY, KEY), strict=True)
  )

  def loss(query, key):
    return jnp.sum(jnp.sin(sliced_start(query, key, *weights)))

  slope = jax.jit(jax.grad(loss, (0, 1)))
  np.testing.assert_allclose(
    start(query, key, *weights), start(QUERY, KEY, *weights), rtol=1e-5, atol=1e-5
  )
  for found, expected, mask in zip(
    slope(query, key),
    slope(QUERY, KEY),
    weights,
    strict=True,
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found[~mask], 0.0)
  nobody = jnp.zeros(N, bool)
  np.testing.assert_array_equal(start(query, key, nobody, weights[1]), 0.0)


def test_gradient_is_that_of_finite_differences():
  weights = on_device(WEIGHTS["masses"])
  slope = jax.random.normal(KEYS[3], (N,))

  def loss(query, key):
    return slope @ sliced_start(query, key, *weights, slices=DIRECTIONS)

  def reference_loss(query, key):
    f = reference(query, key, WEIGHTS["masses"], (DIRECTIONS, DIRECTIONS))
    return np.asarray(slope, np.float64) @ f

  found = jax.jit(jax.grad(loss, (0, 1)))(QUERY, KEY)
  expected = (
    oracles.gradient(lambda query: reference_loss(query, KEY), QUERY),
    oracles.gradient(lambda key: reference_loss(QUERY, key), KEY),
  )
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_order_batch_and_jit_change_nothing():
  batch = jnp.stack([QUERY, QUERY[::-1] ** 2])
  keys = jnp.stack([KEY, 2.0 * KEY])
  together = start(batch, keys)
  mapped = jax.jit(jax.vmap(sliced_start))(batch, keys)
  order = jax.random.permutation(KEYS[4], N)
  for index in range(2):
    alone = sliced_start(batch[index], keys[index])
    tolerance = 1e-3 * float(jnp.abs(alone).max())
    np.testing.assert_allclose(together[index], alone, atol=tolerance)
    np.testing.assert_allclose(mapped[index], alone, atol=tolerance)
    turned = start(batch[index][order], keys[index])
    np.testing.assert_allclose(turned, alone[order], atol=tolerance)


def test_low_precision_is_raised_and_flat_clouds_are_finite():
  low = start(QUERY.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16))
  assert low.dtype == jnp.float32
  high = start(QUERY, KEY)
  np.testing.assert_allclose(low, high, atol=0.05 * float(jnp.abs(high).max()))
  flat = QUERY.at[:, 1:].set(0.0)
  for query, key in ((flat, KEY), (QUERY, jnp.ones_like(KEY)), (0.0 * flat, KEY)):
    assert np.isfinite(start(query, key)).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"key": KEY[:, :2]}, "expected the same last dimension"),
    ({"query_weights": jnp.ones(M)}, r"query_weights has shape \(9,\)"),
    (
      {"slices": "random"},
      r"kind='random': expected one of \('canonical', 'principal'\)",
    ),
    (
      {"slices": jnp.ones((4, 2))},
      r"slices has shape \(4, 2\): expected \[..., slices",
    ),
  ],
)
def test_bad_input_is_named(unchecked, options, message):
  with pytest.raises(ValueError, match=message):
    sliced_start(**({"query": QUERY, "key": KEY} | options))
