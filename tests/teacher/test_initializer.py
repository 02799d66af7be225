"""Gaussian and sliced potentials as starts of OTT-JAX's Sinkhorn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ott.geometry import costs, epsilon_scheduler, geometry, pointcloud
from ott.initializers.linear import initializers
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

import asap_jax
from asap_jax import GaussianDualInitializer, SlicedDualInitializer, gaussian_potential
from asap_jax.potentials.summed import sliced_start

N, M, DIM = 24, 30, 3
KEYS = jax.random.split(jax.random.key(0), 6)
# Two clusters a side, of unlike shapes.
X = jax.random.normal(KEYS[0], (N, DIM)) + 2.0 * (jnp.arange(N)[:, None] % 2)
Y = jax.random.normal(KEYS[1], (M, DIM)) @ jax.random.normal(KEYS[2], (DIM, DIM)) - 1.0
MASSES = {
  "equal": (None, None),
  "zeros": (
    jnp.where(
      jnp.arange(N) % 4 == 1, 0.0, jax.random.uniform(KEYS[3], (N,), minval=0.2)
    ),
    jnp.where(jnp.arange(M) < 20, 1.0, 0.0),
  ),
}
MASSES["zeros"] = tuple(mass / mass.sum() for mass in MASSES["zeros"])
COSTS = {"squared": costs.SqEuclidean(), "product": costs.NegDotProduct()}
# The slices compile for longer.
INITIALIZERS = [
  GaussianDualInitializer,
  pytest.param(SlicedDualInitializer, marks=pytest.mark.slow),
]
each = pytest.mark.parametrize("initializer", INITIALIZERS)


def problem(cost="squared", masses="equal", epsilon=0.5, x=X, y=Y, **options):
  a, b = MASSES[masses]
  cloud = pointcloud.PointCloud(x, y, COSTS[cost], epsilon=epsilon, **options)
  return linear_problem.LinearProblem(cloud, a=a, b=b)


def solver(initializer=None, **options):
  options = {"inner_iterations": 1, "max_iterations": 2000} | options
  return sinkhorn.Sinkhorn(initializer=initializer, **options)


@jax.jit
def solve(problem, initializer):
  return solver(initializer)(problem)


@each
@pytest.mark.parametrize("masses", MASSES)
@pytest.mark.parametrize("cost", COSTS)
def test_same_plan_in_fewer_iterations(cost, masses, initializer):
  given = problem(cost, masses)
  plain, started = solve(given, None), solve(given, initializer())
  assert plain.converged
  assert started.converged
  assert plain.n_iters > 10
  assert started.n_iters < 0.8 * plain.n_iters
  np.testing.assert_allclose(started.matrix, plain.matrix, atol=1e-3)


@pytest.mark.parametrize(("epsilon", "share"), [(0.5, 0.9), (2.0, 0.6)])
def test_samples_of_gaussians_need_fewer_iterations_than_without_entropy(
  epsilon, share
):
  skew = jax.random.normal(KEYS[2], (DIM, DIM))
  x = jax.random.normal(KEYS[0], (200, DIM)) + 1.0
  y = jax.random.normal(KEYS[1], (200, DIM)) @ skew
  given = linear_problem.LinearProblem(pointcloud.PointCloud(x, y, epsilon=epsilon))
  starts = None, initializers.GaussianInitializer(), GaussianDualInitializer()
  plain, without_entropy, gaussian = (solve(given, start) for start in starts)
  assert gaussian.converged
  assert gaussian.n_iters < share * without_entropy.n_iters
  assert gaussian.n_iters < 0.4 * plain.n_iters


def test_affine_image_needs_next_to_nothing():
  # An affine image, with masses that differ: the start is nearly the solution.
  masses = MASSES["zeros"][0]
  moved = X @ jnp.diag(jnp.array([0.5, 1.0, 2.0])) + 3.0
  cloud = pointcloud.PointCloud(X, moved, epsilon=0.05)
  given = linear_problem.LinearProblem(cloud, a=masses, b=masses)
  plain, sliced = solve(given, None), solve(given, SlicedDualInitializer())
  assert sliced.n_iters < 0.2 * plain.n_iters


@jax.jit
def initial(given, initializer):
  return initializer(given, lse_mode=True)


def start(given, kind=SlicedDualInitializer, **options):
  f, g = initial(given, kind(**options))
  assert np.all(np.isfinite(f) == (given.a > 0))
  np.testing.assert_array_equal(g, jnp.where(given.b > 0, 0.0, -jnp.inf))
  return f


POTENTIALS = {
  GaussianDualInitializer: lambda *points: gaussian_potential(
    *points, covariances="full"
  ),
  SlicedDualInitializer: sliced_start,
}


@each
@pytest.mark.parametrize("masses", MASSES)
def test_start_is_the_potential_in_the_units_of_the_cost(masses, initializer):
  given = problem("squared", masses, 0.3, scale_cost=7.0)
  points = 2 * X / 7.0 / 0.3, Y, given.a, given.b
  expected = 0.3 * jax.jit(POTENTIALS[initializer])(*points)
  expected += jnp.sum(X**2, -1) / 7.0 + 0.3 * jnp.log(given.a)
  found = start(given, initializer)
  present = np.flatnonzero(given.a)
  shift = (found - expected)[present]
  np.testing.assert_allclose(shift, shift[0], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", POTENTIALS)
def test_schedules_kernels_and_online_costs_are_served(kind):
  schedule = epsilon_scheduler.Epsilon(0.5, init=4.0, decay=0.5)
  scheduled = problem(epsilon=schedule)
  expected = start(problem(epsilon=2.0), kind)
  np.testing.assert_allclose(start(scheduled, kind), expected, rtol=1e-5)
  assert solve(scheduled, kind()).converged

  kernel = solver(kind(), lse_mode=False)(problem(epsilon=2.0))
  log = solve(problem(epsilon=2.0), kind())
  assert kernel.n_iters == log.n_iters
  np.testing.assert_allclose(kernel.matrix, log.matrix, atol=1e-5)

  online = problem("squared", batch_size=8)
  np.testing.assert_allclose(start(online, kind), start(problem(), kind), rtol=1e-6)


@each
def test_problems_are_solved_in_a_batch(initializer):
  xs = jnp.stack([X, 0.5 * X, -X])
  kind = initializer()
  together = jax.vmap(lambda x: solve(problem(x=x), kind).n_iters)(xs)
  alone = [solve(problem(x=x), kind).n_iters for x in xs]
  np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
  "options", [{"covariances": "diagonal"}, {"covariances": "low_rank", "rank": 2}]
)
def test_other_covariances_are_passed_on(options):
  given = problem("product", epsilon=1.0)
  initializer = GaussianDualInitializer(**options)
  # A pytree: what jit takes apart and puts together is the same start.
  found = jax.jit(lambda i: i.init_fu(given, True))(initializer)
  expected = jax.jit(lambda *points: gaussian_potential(*points, **options))(X, Y)
  np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-4)
  leaves, structure = jax.tree.flatten(initializer)
  assert leaves == []
  held = jax.tree.unflatten(structure, leaves)
  assert (held.covariances, held.rank) == (initializer.covariances, initializer.rank)


@pytest.mark.slow
@pytest.mark.parametrize("slices", ["principal", "directions"])
def test_other_slices_are_passed_on(slices):
  slices = jax.random.orthogonal(KEYS[4], DIM) if slices == "directions" else slices
  given = problem("product", epsilon=1.0)
  initializer = SlicedDualInitializer(slices=slices, entropic=False)
  # A pytree: what jit takes apart and puts together is the same start.
  found = jax.jit(lambda i: i.init_fu(given, True))(initializer)
  expected = sliced_start(X, Y, slices=slices, entropic=False)
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("masses", MASSES)
@pytest.mark.parametrize("cost", COSTS)
def test_a_dual_map_is_asked_in_units_of_logits(cost, masses):
  directions = jax.random.normal(KEYS[4], (1, 2, DIM))
  weights = jax.random.normal(KEYS[5], (1, 2 + DIM + 2))
  held = asap_jax.DualMap(directions, weights)
  given = problem(cost, masses, 0.3)
  factor = 2.0 if cost == "squared" else 1.0
  own = jnp.sum(X**2, -1) if cost == "squared" else 0.0
  tokens = factor * X[None] / 0.3, Y[None], given.a[None], given.b[None]
  # A dual contains the logarithms of masses.
  expected = 0.3 * asap_jax.predict_dual(held, *tokens)[0] + own
  shift = (start(given, dual_map=held) - expected)[np.flatnonzero(given.a)]
  np.testing.assert_allclose(shift, shift[0], atol=1e-3)


def test_bad_input_is_named():
  many = asap_jax.DualMap(jnp.ones((2, 1, DIM)), jnp.ones((2, 6)))
  with pytest.raises(ValueError, match="dual_map has 2 heads: expected one"):
    SlicedDualInitializer(many)


@pytest.mark.parametrize("kind", POTENTIALS)
def test_problems_that_are_no_point_clouds_of_such_costs(kind):
  matrix = geometry.Geometry(cost_matrix=jnp.ones((N, M)), epsilon=1.0)
  given = linear_problem.LinearProblem(matrix)
  with pytest.raises(ValueError, match="Geometry with cost NoneType: expected a Point"):
    start(given, kind)
  given = linear_problem.LinearProblem(pointcloud.PointCloud(X, Y, costs.Euclidean()))
  with pytest.raises(ValueError, match="PointCloud with cost Euclidean: expected"):
    start(given, kind)


def test_covariances_that_are_unknown(unchecked):
  with pytest.raises(ValueError, match="covariances='half': expected one of"):
    start(problem(), GaussianDualInitializer, covariances="half")
  with pytest.raises(ValueError, match="rank=0: expected at least one direction"):
    start(problem(), GaussianDualInitializer, covariances="low_rank", rank=0)


@each
def test_gradients_of_the_cost_do_not_depend_on_the_start(initializer):
  def cost(x, initializer):
    return solver(initializer, threshold=1e-5)(problem(x=x)).reg_ot_cost

  found, expected = (
    jax.jit(jax.grad(cost))(X, start) for start in (initializer(), None)
  )
  assert np.abs(expected).max() > 1e-3
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
