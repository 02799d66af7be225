import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import KEY_MASK, QUERY_MASK, WEIGHTS, M, N, on_device
from ott.geometry import pointcloud
from ott.geometry.costs import SqEuclidean
from ott.problems.linear import linear_problem
from ott.solvers.linear import univariate

from asap_jax.potentials.kantorovich import kantorovich_potentials

weighted = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
solve = jax.jit(kantorovich_potentials, static_argnames="cost")


def points(seed=0, n=N, m=M):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=n), rng.normal(1.0, 2.0, size=m)
  return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def assert_optimal(x, y, weights, cost, atol=1e-5):
  """Feasible, and the dual value equals the primal value of a linear program."""
  result = solve(x, y, *on_device(weights), cost=cost)
  phi, psi = (np.asarray(p, np.float64) for p in result[:2])
  a, b = (
    np.array(oracles.masses(w, len(p)), np.float64)
    for w, p in zip(weights, (x, y), strict=True)
  )
  costs = oracles.cost_matrix(x, y, cost)
  slack = costs - phi[:, None] - psi
  assert slack[np.ix_(a > 0, b > 0)].min() > -atol
  value = oracles.transport_cost(costs, a, b)
  np.testing.assert_allclose(a @ phi + b @ psi, value, atol=atol)
  for potential, mass in ((phi, a), (psi, b), (np.asarray(result.transport), a)):
    np.testing.assert_array_equal(potential[mass == 0], 0)


@weighted
def test_optimal_against_a_linear_program(weights):
  assert_optimal(*points(), weights, "product")


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
def test_optimal_for_the_squared_cost(key):
  assert_optimal(*points(), WEIGHTS[key], "squared")


@pytest.mark.parametrize(("n", "m"), [(7, 7), (9, 6), (1, 5), (5, 1), (1, 1)])
def test_optimal_for_other_sizes(n, m):
  assert_optimal(*points(n=n, m=m), (None, None), "product")


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize(
  ("x", "y"),
  [
    ([1, 0, 1, 1, 0, -1], [2, 2, 0, 0, 0, 1, 2, 1, 1]),
    ([0] * 6, [3, 1, 4, 1, 5, 9, 2, 6, 5]),
    ([3, 1, 4, 1, 5, 9], [-2] * 9),
    ([0] * 6, [0] * 9),
  ],
  ids=["ties", "constant x", "constant y", "null"],
)
def test_optimal_with_ties(x, y, key):
  x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  assert_optimal(x, y, WEIGHTS[key], "product")


@weighted
def test_midpoint_convention_and_normalisation(weights):
  x, y = points(3)
  phi, psi, transport = solve(x, y, *on_device(weights))
  expected = oracles.potentials(x, y, *weights)
  np.testing.assert_allclose(phi, expected[0], atol=1e-5)
  np.testing.assert_allclose(psi, expected[1], atol=1e-5)
  expected = oracles.transport(np.asarray(x, np.float64), np.asarray(y), *weights)
  np.testing.assert_allclose(transport, expected, atol=1e-6)


def test_transport_of_equal_sizes_is_the_sorted_matching():
  x, y = points(n=7, m=7)
  matching = np.empty(7)
  matching[np.argsort(x)] = np.sort(y)
  np.testing.assert_array_equal(solve(x, y).transport, matching.astype(np.float32))


@pytest.mark.parametrize("key", ["equal", "masses"])
def test_against_north_west_duals(key):
  # They are optimal too, with one end of the jump where ours take the middle.
  x, y = points(1)
  weights = WEIGHTS[key]
  a, b = (
    jnp.asarray(np.array(oracles.masses(w, s), np.float32))
    for w, s in zip(weights, (N, M), strict=True)
  )

  @jax.jit
  def north_west(x, y):
    ground = pointcloud.PointCloud(x[:, None], y[:, None], cost_fn=SqEuclidean())
    problem = linear_problem.LinearProblem(ground, a, b)
    return univariate.north_west_solver(problem)

  # Their cost is twice ours.
  theirs = north_west(x, y)
  ours = solve(x, y, *on_device(weights), cost="squared")
  value = a @ ours.phi + b @ ours.psi
  np.testing.assert_allclose(value, theirs.ot_costs[0] / 2, rtol=1e-5)
  product = solve(x, y, *on_device(weights), cost="product")
  squared = (np.asarray(x, np.float64) ** 2 / 2, np.asarray(y, np.float64) ** 2 / 2)
  value = a @ (product.phi + squared[0]) + b @ (product.psi + squared[1])
  np.testing.assert_allclose(value, theirs.ot_costs[0] / 2, rtol=1e-5)

  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  order, ends = oracles.slopes(x, y, *weights)
  for phi in (product.phi, ours.phi - squared[0], theirs.dual_a[0] / 2 - squared[0]):
    slope = -np.diff(np.asarray(phi)[order]) / np.diff(x[order])
    assert np.all(ends[:, 0] - 1e-4 <= slope)
    assert np.all(slope <= ends[:, 1] + 1e-4)


@pytest.mark.parametrize("side", ["x", "y", "both"])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_no_points_give_zeros(side, dtype):
  weights = [
    np.full(s, side not in (p, "both"), dtype) for p, s in (("x", N), ("y", M))
  ]
  result = solve(*points(), *on_device(weights))
  assert jax.tree.all(jax.tree.map(lambda p: jnp.isfinite(p).all(), result))
  for potential, weight in zip(result, (*weights, weights[0]), strict=True):
    np.testing.assert_array_equal(np.asarray(potential)[weight == 0], 0)


@pytest.mark.parametrize(
  ("key", "cost"),
  [
    ("equal", "product"),
    ("masks", "product"),
    ("masses with zeros", "product"),
    ("masks", "squared"),
  ],
)
def test_gradients_against_finite_differences(key, cost):
  weights = WEIGHTS[key]
  x, y = (np.asarray(p, np.float64) for p in points(3))
  u, v = (
    np.random.default_rng(1).normal(size=N),
    np.random.default_rng(2).normal(size=M),
  )

  def oracle(x, y):
    phi, psi = oracles.potentials(x, y, *weights, cost)
    return u @ phi + v @ psi

  @jax.jit
  @jax.grad
  def slope(both):
    phi, psi, _ = kantorovich_potentials(*both, *on_device(weights), cost=cost)
    return jnp.vdot(u, phi) + jnp.vdot(v, psi)

  along_x, along_y = slope(points(3))
  expected = oracles.gradient(lambda x: oracle(x, y), x)
  np.testing.assert_allclose(along_x, expected, atol=1e-4)
  expected = oracles.gradient(lambda y: oracle(x, y), y)
  np.testing.assert_allclose(along_y, expected, atol=1e-4)


def test_gradient_of_the_dual_value_is_the_optimal_map():
  # The envelope theorem: d/dx_i of the transport cost is -a_i y_sigma(i).
  x, y = points(n=7, m=7)

  def value(x):
    result = kantorovich_potentials(x, y)
    return result.phi.mean() + result.psi.mean()

  expected = np.empty(7)
  expected[np.argsort(x)] = -np.sort(y) / 7
  np.testing.assert_allclose(jax.jit(jax.grad(value))(x), expected, atol=1e-5)


@pytest.mark.parametrize(("cost", "dtype"), [("product", bool), ("squared", float)])
def test_holes_in_padding_reach_neither_values_nor_gradients(cost, dtype):
  x, y = points()
  weights = on_device((QUERY_MASK.astype(dtype), KEY_MASK.astype(dtype)))

  @jax.jit
  @jax.value_and_grad
  def loss(both):
    result = kantorovich_potentials(*both, *weights, cost=cost)
    return sum(jnp.sum(jnp.sin(potential)) for potential in result)

  expected = loss((x, y))
  for hole in (np.nan, np.inf, -np.inf):
    holed = jnp.where(QUERY_MASK, x, hole), jnp.where(KEY_MASK, y, hole)
    jax.tree.map(np.testing.assert_array_equal, loss(holed), expected)


def test_batches_and_vmap_agree_with_a_loop():
  x, y = (jnp.stack(p) for p in zip(*(points(seed) for seed in range(3)), strict=True))
  masks = jnp.stack([jnp.roll(QUERY_MASK, shift) for shift in range(3)])
  key_mask = jnp.asarray(KEY_MASK)
  loop = [solve(*row, key_mask) for row in zip(x, y, masks, strict=True)]
  loop = jax.tree.map(lambda *rows: jnp.stack(rows), *loop)
  mapped = jax.jit(jax.vmap(kantorovich_potentials, in_axes=(0, 0, 0, None)))
  for other in (mapped(x, y, masks, key_mask), solve(x, y, masks, key_mask)):
    for ours, theirs in zip(loop, other, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_jit_agrees_with_eager():
  eager = kantorovich_potentials(*points())
  for ours, theirs in zip(solve(*points()), eager, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_half_precision_points_give_float32_potentials():
  x, y = (p.astype(jnp.bfloat16) for p in points())
  result = solve(x, y)
  assert {p.dtype for p in result} == {jnp.dtype(jnp.float32)}
  # The points are rounded, the arithmetic on them is not.
  expected = oracles.potentials(x.astype(jnp.float32), y.astype(jnp.float32))
  np.testing.assert_allclose(result.phi, expected[0], atol=1e-5)
  np.testing.assert_allclose(result.psi, expected[1], atol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"x_weights": np.ones(M, bool)}, "x_weights has shape"),
    ({"y_weights": np.ones(N, np.float32)}, "y_weights has shape"),
    ({"y_weights": np.ones(M, np.int32)}, "y_weights has dtype int32"),
    ({"cost": "cubic"}, "cost='cubic'"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused(arguments, message):
  if "cost" not in arguments:
    arguments = jax.tree.map(jnp.asarray, arguments)
  with pytest.raises(ValueError, match=message):
    kantorovich_potentials(*points(), **arguments)


def test_sizes_beyond_whole_number_arithmetic_are_refused():
  x = jax.ShapeDtypeStruct((2**16,), jnp.float32)
  y = jax.ShapeDtypeStruct((2**15 + 1,), jnp.float32)
  with pytest.raises(ValueError, match="expected at most 2"):
    jax.eval_shape(kantorovich_potentials, x, y)
  # One to one, there is no ratio of masses.
  assert jax.eval_shape(kantorovich_potentials, x, x).phi.shape == x.shape
