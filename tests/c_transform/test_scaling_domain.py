"""Plans in the scaling domain, against NumPy float64 and the log domain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import (
  STEPS,
  WEIGHTS,
  M,
  N,
  on_device,
  presence,
  random_dual,
  random_logits,
  steps_on_device,
)
from hypothesis import given
from hypothesis import strategies as st

from asap_jax.c_transform import entropic as c_transform
from asap_jax.c_transform.scaling_domain import scaled_plan

weighted = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
solve = jax.jit(scaled_plan, static_argnums=2, static_argnames="side")
OMEGA = jnp.asarray([1.5, 0.7, 1.9], jnp.float32)


@weighted
@pytest.mark.parametrize("relaxation", [None, OMEGA], ids=["plain", "relaxed"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_closures_against_float64(weights, relaxation, scale):
  logits, f = random_logits(scale=scale)
  expected = oracles.closures(logits, f, 4, *weights, relaxation)
  result = solve(logits, f, 4, *on_device(weights), relaxation=relaxation)
  for ours, theirs in zip(result.duals, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
  plan = result.dense()
  expected = oracles.plan(logits, *expected, *weights)
  np.testing.assert_allclose(plan, expected, atol=1e-5 * scale)
  np.testing.assert_array_equal(plan[~presence(weights)], 0)
  rows = oracles.present(weights[0], N)
  row_sums, _ = oracles.plan_sums(*weights, N, M)
  np.testing.assert_allclose(plan.sum(1)[rows], row_sums, rtol=1e-6)


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("scale", [1.0, 150.0])
def test_momentum_and_the_key_side_against_float64(case, key, scale):
  count, options = STEPS[case]
  logits, dual = random_logits(scale=scale)[0], scale * random_dual(options)
  weights = WEIGHTS[key]
  assert scale == 1.0 or np.abs(logits).max() > 300
  expected = oracles.closures(logits, dual, count, *weights, **options)
  given = on_device(weights)
  result = solve(logits, dual, count, *given, **steps_on_device(options))
  for ours, theirs in zip(result.duals, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
  plan = result.dense()
  expected = oracles.plan(logits, *expected, *weights)
  np.testing.assert_allclose(plan, expected, atol=1e-5 * scale)
  np.testing.assert_array_equal(plan[~presence(weights)], 0)
  rows = plan.sum(1)[oracles.present(weights[0], N)]
  np.testing.assert_allclose(rows, oracles.plan_sums(*weights, N, M)[0], rtol=1e-6)


@given(
  st.floats(0, 500),
  st.floats(0, 500),
  st.sampled_from([1, 2, 7]),
  st.sampled_from(["equal", "masks", "masses"]),
  st.integers(0, 2**31),
)
def test_any_logits_and_any_start(scale, scale_f, count, kind, seed):
  rng = np.random.default_rng(seed)
  logits = np.float32(scale * rng.uniform(-1, 1, size=(N, M)))
  f = np.float32(scale_f * rng.uniform(-1, 1, size=N))
  weights = WEIGHTS[kind]
  expected = oracles.closures(logits, f, count, *weights)
  result = solve(jnp.asarray(logits), jnp.asarray(f), count, *on_device(weights))
  for ours, theirs in zip(result.duals, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
  plan = result.dense()
  np.testing.assert_allclose(
    plan, oracles.plan(logits, *expected, *weights), rtol=2e-3, atol=1e-6
  )
  np.testing.assert_allclose(
    plan.sum(1)[oracles.present(weights[0], N)],
    oracles.plan_sums(*weights, N, M)[0],
    rtol=1e-6,
  )


def far_row():
  """A row that is nowhere near any column's maximum: its sum underflows."""
  logits, f = random_logits(1)
  return logits.at[2].add(-300.0), f


@pytest.mark.parametrize("count", [1, 3])
def test_a_row_out_of_range_is_absorbed(count):
  logits, f = far_row()
  result = solve(logits, f, count)
  expected = oracles.closures(logits, f, count)
  np.testing.assert_allclose(
    result.dense(), oracles.plan(logits, *expected), rtol=1e-4, atol=1e-6
  )
  # Absorbed: what is left to scale is of the order of one.
  assert result.rows.max() < 1e3


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize("arguments", [random_logits, far_row], ids=["near", "far"])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients_against_finite_differences(key, arguments, count):
  weights = WEIGHTS[key]
  logits, f = arguments()
  relaxation = OMEGA[: count - 1]
  rng = np.random.default_rng(5)
  u, v, w = rng.normal(size=N), rng.normal(size=M), rng.normal(size=(N, M))

  def oracle(logits, f, relaxation):
    duals = oracles.closures(logits, f, count, *weights, relaxation)
    weighed = oracles.plan(logits, *duals, *weights)
    return u @ duals[0] + v @ duals[1] + np.vdot(w, weighed)

  @jax.jit
  @jax.grad
  def slope(all_three):
    logits, f, relaxation = all_three
    given = on_device(weights)
    result = scaled_plan(logits, f, count, *given, relaxation=relaxation)
    duals = result.duals
    along_duals = jnp.vdot(u, duals.f) + jnp.vdot(v, duals.g)
    return along_duals + jnp.vdot(w, result.dense())

  # Whatever finite values the padding holds, gradients are zero there.
  padding = 50.0 * ~presence(weights)
  actual = slope((logits + padding, f, relaxation))
  point = [np.asarray(a, np.float64) for a in (logits, f, relaxation)]
  for place, ours in enumerate(actual):

    def along(moved, place=place):
      return oracle(*(moved if i == place else a for i, a in enumerate(point)))

    expected = oracles.gradient(along, point[place])
    np.testing.assert_allclose(ours, expected, atol=2e-4)
  np.testing.assert_array_equal(actual[0][~presence(weights)], 0)


@pytest.mark.parametrize(
  "case", ["half", "key and momentum", pytest.param("momentum", marks=pytest.mark.slow)]
)
def test_derivatives_along_everything_agree_with_the_log_domain(case):
  count, options = STEPS[case]
  logits, dual = random_logits(3)[0], random_dual(options)
  factors, given = steps_on_device(options), on_device(WEIGHTS["masks"])
  side = factors.pop("side", "query")
  point = logits, dual, factors
  rng = np.random.default_rng(4)
  tangent = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), point
  )

  def scaled(logits, dual, factors):
    result = scaled_plan(logits, dual, count, *given, **factors, side=side)
    return result.dense(), result.duals

  def plain(logits, dual, factors):
    duals = c_transform.closures(logits, dual, count, *given, **factors, side=side)
    return c_transform.plan(logits, duals, *given), duals

  ours, theirs = (
    jax.jit(functools.partial(jax.jvp, f))(point, tangent) for f in (scaled, plain)
  )
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
  jax.tree.map(compare, ours, theirs)


def test_vmap_over_near_and_far_agrees_with_a_loop():
  pairs = [random_logits(), far_row(), random_logits(3, scale=100.0)]
  logits, f = (jnp.stack(p) for p in zip(*pairs, strict=True))
  mask = jnp.asarray(WEIGHTS["masks"][0])

  @jax.value_and_grad
  def loss(logits, f):
    result = scaled_plan(logits, f, 3, mask, relaxation=OMEGA[:2])
    return jnp.sum(jnp.sin(result.dense()) + result.duals.g)

  loop = [jax.jit(loss)(*pair) for pair in pairs]
  loop = jax.tree.map(lambda *rows: jnp.stack(rows), *loop)
  mapped = jax.jit(jax.vmap(loss))(logits, f)
  for ours, theirs in zip(mapped, loop, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_one_closure_agree_with_the_log_domain():
  logits, f = random_logits(6, scale=1.0)
  tangent = jnp.asarray(np.random.default_rng(7).normal(size=(N, M)), jnp.float32)

  def curvature(function):
    def loss(logits):
      return jnp.sum(jnp.sin(function(logits)) * tangent)

    return jax.jit(
      lambda x: jax.jvp(jax.grad(loss), (x,), (tangent,))[1],
    )(logits)

  ours = curvature(lambda x: scaled_plan(x, f, 1).dense())
  theirs = curvature(lambda x: c_transform.plan(x, c_transform.closures(x, f, 1)))
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_per_head_relaxation_broadcasts_over_the_batch():
  logits = jax.random.normal(jax.random.key(0), (3, 2, N, M))
  f = jax.random.normal(jax.random.key(1), (3, 2, N))
  relaxation = jnp.asarray([[1.5, 0.7], [1.0, 1.9]])
  ours = solve(logits, f, 3, relaxation=relaxation).duals
  theirs = jax.jit(c_transform.closures, static_argnums=2)(
    logits, f, 3, relaxation=relaxation
  )
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
  ("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.01)]
)
def test_apply_against_float64(dtype, atol):
  logits, f = far_row()
  weights = WEIGHTS["masks"]
  value = np.random.default_rng(6).normal(size=(M, 3))
  value[~presence(weights).any(0)] = np.nan
  result = solve(logits, f, 1, *on_device(weights))
  actual = result.apply(jnp.asarray(value, dtype), jnp.asarray(weights[1]))
  assert actual.dtype == dtype
  weighed = oracles.plan(logits, *oracles.closures(logits, f, 1, *weights), *weights)
  expected = weighed @ np.nan_to_num(value)
  np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=atol)


@pytest.mark.parametrize("side", ["queries", "keys", "both"])
def test_no_points_give_zeros_and_no_nan(side):
  logits, f = random_logits()
  weights = (
    jnp.full(N, side == "keys"),
    jnp.full(M, side == "queries"),
  )

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    result = scaled_plan(logits, f, 2, *weights)
    return jnp.sum(result.dense()) + jnp.sum(result.duals.f + result.duals.g.sum())

  value, slope = loss(logits)
  assert np.isfinite(value)
  assert np.isfinite(slope).all()
  np.testing.assert_array_equal(solve(logits, f, 2, *weights).dense(), 0)


def test_nan_logits_stay_visible():
  logits, f = random_logits()
  assert jnp.isnan(solve(logits.at[1, 2].set(jnp.nan), f, 2).dense()).any()


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
  logits, f = random_logits()
  with pytest.raises(ValueError, match="count=0"):
    scaled_plan(logits, f, 0)
  with pytest.raises(ValueError, match="relaxation has shape"):
    scaled_plan(logits, f, 2, relaxation=jnp.ones(2))
  with pytest.raises(ValueError, match="momentum has shape"):
    scaled_plan(logits, f, 2, momentum=jnp.ones(2))
  with pytest.raises(ValueError, match="side='both'"):
    scaled_plan(logits, f, 1, side="both")
  with pytest.raises(ValueError, match="query_weights has shape"):
    scaled_plan(logits, f, 1, jnp.ones(M, bool))
