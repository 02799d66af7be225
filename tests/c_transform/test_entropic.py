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
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from asap_jax.c_transform.entropic import (
  Duals,
  apply_plan,
  c_transform,
  closure,
  closures,
  plan,
)

weighted = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
to_query = jax.jit(lambda *a: c_transform(*a, to="query"))
to_key = jax.jit(lambda *a: c_transform(*a, to="key"))
close = jax.jit(closure)
close_often = jax.jit(closures, static_argnums=2, static_argnames="side")
weigh = jax.jit(plan)


def assert_duals(actual, expected, atol=1e-5):
  for ours, theirs in zip(actual, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=atol)


@weighted
def test_closure_and_its_halves_against_float64(weights):
  logits, f = random_logits()
  expected = oracles.closures(logits, f, 1, *weights)
  given = on_device(weights)
  assert_duals(close(logits, f, *given), expected)
  g = to_key(logits, f, *given)
  assert_duals((to_query(logits, g, *given), g), expected)


@weighted
def test_closures_and_plan_against_float64(weights):
  logits, f = random_logits(1)
  expected = oracles.closures(logits, f, 4, *weights)
  duals = close_often(logits, f, 4, *on_device(weights))
  assert_duals(duals, expected)
  actual = weigh(logits, duals, *on_device(weights))
  np.testing.assert_allclose(
    actual, oracles.plan(logits, *expected, *weights), atol=1e-5
  )
  np.testing.assert_array_equal(actual[~presence(weights)], 0)


@weighted
def test_over_relaxed_closures_against_float64(weights):
  logits, f = random_logits(7)
  relaxation = jnp.asarray([1.5, 0.7, 1.9], jnp.float32)
  expected = oracles.closures(logits, f, 4, *weights, relaxation)
  given = on_device(weights)
  assert_duals(close_often(logits, f, 4, *given, relaxation=relaxation), expected, 2e-5)
  ones = close_often(logits, f, 4, *given, relaxation=jnp.ones(3))
  assert_duals(ones, close_often(logits, f, 4, *given))


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize("case", STEPS)
def test_momentum_and_the_key_side_against_float64(case, key):
  count, options = STEPS[case]
  logits, dual, weights = random_logits(7)[0], random_dual(options), WEIGHTS[key]
  expected = oracles.closures(logits, dual, count, *weights, **options)
  given = on_device(weights)
  duals = close_often(logits, dual, count, *given, **steps_on_device(options))
  assert_duals(duals, expected, 2e-5)
  rows = weigh(logits, duals, *given).sum(1)[oracles.present(weights[0], N)]
  np.testing.assert_allclose(rows, oracles.plan_sums(*weights, N, M)[0], atol=1e-5)


def test_the_first_factor_of_momentum_counts_for_nothing():
  logits, f = random_logits(8)
  momentum = jnp.asarray([0.0, 0.4])
  expected = close_often(logits, f, 3, momentum=momentum)
  assert_duals(close_often(logits, f, 3, momentum=momentum.at[0].set(5.0)), expected)
  none = close_often(logits, f, 3, momentum=jnp.zeros(2))
  assert_duals(none, close_often(logits, f, 3))
  assert np.abs(expected.f - none.f).max() > 1e-3


def test_half_a_closure_is_a_softmax_with_a_bias_of_the_keys():
  logits, g = random_logits(9)[0], random_dual({"side": "key"})
  duals = close_often(logits, g, 0, side="key")
  np.testing.assert_array_equal(duals.g, g)
  expected = jax.nn.softmax(logits + g, axis=-1)
  np.testing.assert_allclose(weigh(logits, duals), expected, atol=1e-6)


def test_relaxation_per_head_and_its_gradient_against_finite_differences():
  logits, f = (jnp.stack(p) for p in zip(*map(random_logits, (8, 9)), strict=True))
  weights = WEIGHTS["masks"]
  relaxation = jnp.asarray([[1.5, 0.7], [1.0, 1.8]], jnp.float32)
  u = np.random.default_rng(10).normal(size=N)

  def oracle(omega, head):
    return u @ oracles.closures(logits[head], f[head], 3, *weights, omega)[0]

  @jax.jit
  @jax.value_and_grad
  def loss(relaxation):
    duals = closures(logits, f, 3, *on_device(weights), relaxation=relaxation)
    return jnp.vdot(u, duals.f.sum(0))

  value, slope = loss(relaxation)
  by_head = [oracle(omega, head) for head, omega in enumerate(relaxation)]
  np.testing.assert_allclose(value, sum(by_head), rtol=1e-4, atol=1e-4)
  for head, omega in enumerate(relaxation):
    expected = oracles.gradient(lambda w, head=head: oracle(w, head), omega)
    np.testing.assert_allclose(slope[head], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["momentum", "key and momentum"])
def test_gradients_of_factors_and_start_against_finite_differences(case):
  count, options = STEPS[case]
  logits, dual, weights = random_logits(10)[0], random_dual(options), WEIGHTS["masks"]
  side = options.get("side", "query")
  point = [np.asarray(x) for x in (dual, options["relaxation"], options["momentum"])]
  u, v = (np.random.default_rng(11).normal(size=size) for size in (N, M))

  def oracle(dual, relaxation, momentum):
    factors = {"relaxation": relaxation, "momentum": momentum, "side": side}
    f, g = oracles.closures(logits, dual, count, *weights, **factors)
    return u @ f + v @ g

  @jax.jit
  @jax.grad
  def slopes(point):
    dual, relaxation, momentum = point
    factors = {"relaxation": relaxation, "momentum": momentum, "side": side}
    duals = closures(logits, dual, count, *on_device(weights), **factors)
    return jnp.vdot(u, duals.f) + jnp.vdot(v, duals.g)

  given = [jnp.asarray(x, jnp.float32) for x in point]
  for place, slope in enumerate(slopes(given)):

    def along(moved, place=place):
      return oracle(*(moved if i == place else x for i, x in enumerate(point)))

    expected = oracles.gradient(along, point[place])
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=2e-4)
  assert np.abs(slope[1:]).min() > 1e-3  # of the momentum
  assert slope[0] == 0


@weighted
def test_row_sums_are_exact_and_column_sums_converge(weights):
  logits, f = random_logits(2, scale=1.0)
  query_weights, key_weights = weights
  rows = oracles.present(query_weights, N)
  columns = oracles.present(key_weights, M)
  row_sums, column_sums = oracles.plan_sums(*weights, N, M)
  once = weigh(logits, close(logits, f, *on_device(weights)), *on_device(weights))
  np.testing.assert_allclose(once.sum(1)[rows], row_sums, atol=1e-5)
  assert np.abs(once.sum(0)[columns] - column_sums).max() > 1e-2
  duals = close_often(logits, f, 100, *on_device(weights))
  often = weigh(logits, duals, *on_device(weights))
  np.testing.assert_allclose(often.sum(1)[rows], row_sums, atol=1e-5)
  np.testing.assert_allclose(often.sum(0)[columns], column_sums, atol=1e-4)


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
def test_closure_is_one_iteration_of_ott(key):
  weights = WEIGHTS[key]
  logits, f = random_logits(3)
  a, b = (
    jnp.asarray(np.array(oracles.masses(w, s), np.float32))
    for w, s in zip(weights, (N, M), strict=True)
  )

  @jax.jit
  def iterate(logits, f):
    solver = sinkhorn.Sinkhorn(
      min_iterations=1,
      max_iterations=1,
      inner_iterations=1,
      threshold=0.0,
      implicit_diff=None,
    )
    cost = geometry.Geometry(cost_matrix=-logits, epsilon=1.0)
    out = solver(linear_problem.LinearProblem(cost, a, b), init=(f, jnp.zeros(M)))
    return out.f, out.g

  present = presence(weights)
  # An absent point is one at minus infinity there, and it must start there.
  f_theirs, g_theirs = iterate(logits, jnp.where(present.any(1), f, -jnp.inf))
  # Its plan sums to one, ours to the number of present queries.
  g_theirs = g_theirs + np.log(present.any(1).sum())
  ours = close(logits, f, *on_device(weights))
  np.testing.assert_allclose(ours.f, np.where(present.any(1), f_theirs, 0), atol=1e-5)
  np.testing.assert_allclose(ours.g, np.where(present.any(0), g_theirs, 0), atol=1e-5)


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
def test_gradients_against_finite_differences(key):
  weights = WEIGHTS[key]
  logits, f = random_logits(4, scale=1.0)
  rng = np.random.default_rng(5)
  u, v, w = rng.normal(size=N), rng.normal(size=M), rng.normal(size=(N, M))

  def oracle(logits, f):
    duals = oracles.closures(logits, f, 2, *weights)
    weighed = oracles.plan(logits, *duals, *weights)
    return u @ duals[0] + v @ duals[1] + np.vdot(w, weighed)

  @jax.jit
  @jax.grad
  def slope(both):
    logits, f = both
    given = on_device(weights)
    duals = closures(logits, f, 2, *given)
    weighed = plan(logits, duals, *given)
    return jnp.vdot(u, duals.f) + jnp.vdot(v, duals.g) + jnp.vdot(w, weighed)

  # Whatever finite values the padding holds, gradients are zero there.
  padding = 50.0 * ~presence(weights)
  along_logits, along_f = slope((logits + padding, f))
  logits, f = np.asarray(logits, np.float64), np.asarray(f, np.float64)
  expected = oracles.gradient(lambda s: oracle(s, f), logits)
  np.testing.assert_allclose(along_logits, expected, atol=1e-4)
  np.testing.assert_array_equal(along_logits[~presence(weights)], 0)
  expected = oracles.gradient(lambda f: oracle(logits, f), f)
  np.testing.assert_allclose(along_f, expected, atol=1e-4)


@pytest.mark.parametrize("key", ["equal", "masks"])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_apply_plan_against_float64(key, dtype, atol):
  logits, f = random_logits()
  value = np.random.default_rng(6).normal(size=(M, 3))
  value[~presence(WEIGHTS[key]).any(0)] = np.nan
  given = on_device(WEIGHTS[key])
  duals = close(logits, f, *given)
  actual = jax.jit(apply_plan)(logits, duals, jnp.asarray(value, dtype), *given)
  assert actual.dtype == dtype
  weighed = oracles.plan(
    logits, *oracles.closures(logits, f, 1, *WEIGHTS[key]), *WEIGHTS[key]
  )
  expected = weighed @ np.nan_to_num(value)
  np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=atol)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
  logits, f = random_logits()
  wrong = jnp.ones(M, bool)
  duals = Duals(f, jnp.zeros(M))
  with pytest.raises(ValueError, match="query_weights has shape"):
    closure(logits, f, wrong)
  with pytest.raises(ValueError, match="key_weights has shape"):
    plan(logits, duals, None, jnp.ones(N, bool))
  with pytest.raises(ValueError, match="key_weights has dtype int32"):
    apply_plan(logits, duals, jnp.ones((M, 2)), None, jnp.ones(M, jnp.int32))
  with pytest.raises(ValueError, match="to='value'"):
    c_transform(logits, f, to="value")
  with pytest.raises(ValueError, match="count=0"):
    closures(logits, f, 0)
  with pytest.raises(ValueError, match=r"relaxation has shape \(3,\).*count=3"):
    closures(logits, f, 3, relaxation=jnp.ones(3))
  with pytest.raises(ValueError, match=r"momentum has shape \(1,\): .*\[..., 2\]"):
    closures(logits, f, 3, momentum=jnp.ones(1))
  with pytest.raises(ValueError, match=r"momentum has shape \(1,\): .*\[..., 0\]"):
    closures(logits, jnp.zeros(M), 0, momentum=jnp.ones(1), side="key")
  with pytest.raises(ValueError, match="count=-1: expected at least 0 from the key"):
    closures(logits, jnp.zeros(M), -1, side="key")
  with pytest.raises(ValueError, match=r"side='value': expected .*query.*key"):
    closures(logits, f, 1, side="value")
