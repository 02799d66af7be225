"""Values and gradients of Gaussian potentials against float64, and their errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_references as references
from helpers.gaussian_references import COVARIANCES, SIDES
from helpers.oracles import WEIGHTS, M, N, on_device

from asap_jax import gaussian_potential

DIM = 3
KEYS = jax.random.split(jax.random.key(0), 4)
SKEW = jnp.array([[1.0, 0.4, 0.0], [0.0, 1.0, -0.7], [0.3, 0.0, 0.5]])
QUERY = jax.random.normal(KEYS[0], (N, DIM)) @ SKEW + 0.5
KEY = 1.5 * jax.random.normal(KEYS[1], (M, DIM)) @ SKEW.T - 0.2

potential = jax.jit(gaussian_potential, static_argnames=("covariances", "rank", "side"))


every = pytest.mark.parametrize("covariances", COVARIANCES)


def both_sides(query, key, *weights, covariances, rank=2):
  """f and g."""
  return tuple(
    gaussian_potential(
      query, key, *weights, covariances=covariances, rank=rank, side=side
    )
    for side in SIDES
  )


solve = jax.jit(both_sides, static_argnames=("covariances", "rank"))


def assert_potentials(
  found, query, key, weights=(None, None), *, covariances, rank=2, rtol=2e-5
):
  """f and g are those of the reference, up to a constant."""
  for side, value, own in zip(SIDES, found, weights, strict=True):
    expected = references.potential(query, key, weights, covariances, rank, side)
    mass = references.masses(own, len(expected))
    np.testing.assert_array_equal(np.asarray(value)[mass == 0], 0.0)
    atol = rtol * np.abs(expected).max() + 1e-6 * np.abs(value).max() + 1e-12
    value = references.centred(value, mass)
    np.testing.assert_allclose(value, expected, atol=atol, err_msg=side)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in ("equal", "masks") else pytest.mark.slow)
    for name in WEIGHTS
  ],
)
@every
def test_values_are_those_of_the_formula(covariances, name):
  weights = WEIGHTS[name]
  found = solve(QUERY, KEY, *on_device(weights), covariances=covariances)
  assert_potentials(found, QUERY, KEY, weights, covariances=covariances)


@pytest.mark.parametrize(
  "dim", [1, 9, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (6, 16))]
)
@every
def test_values_from_blurred_to_sharp_logits(covariances, dim):
  rng = np.random.default_rng(dim)
  query, key = (
    rng.normal(size=(size, dim)) @ rng.normal(size=(dim, dim)) + shift
    for size, shift in ((12, 0.5), (17, -0.2))
  )
  for largest in (0.01, 3.0, 1e3):
    scale = largest / np.abs(query @ key.T).max()
    points = jnp.asarray(scale * query, jnp.float32), jnp.asarray(key, jnp.float32)
    # Of the covariances' product float32 sees about a millionth.
    rtol = 1e-5 if largest < 10 else 5e-4
    found = solve(*points, covariances=covariances)
    assert_potentials(found, *points, covariances=covariances, rtol=rtol)


def test_the_formula_is_where_iterations_between_gaussians_end():
  # Quadratic duals stay quadratic: V becomes U = (A^-1 + V)^-1 for g, and U so V.
  a, b = (references.moments(points)[2] for points in (QUERY, KEY))
  v = np.zeros((DIM, DIM))
  for _ in range(300):
    u = np.linalg.inv(np.linalg.inv(a) + v)
    v = np.linalg.inv(np.linalg.inv(b) + u)
  for side, matrix in (("query", v), ("key", u)):
    own, other = (QUERY, KEY) if side == "query" else (KEY, QUERY)
    expected = references.quadratic(own, None, other, None, matrix)
    found = potential(QUERY, KEY, covariances="full", side=side)
    found = references.centred(found, references.masses(None, len(own)))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rank", [7, pytest.param(DIM, marks=pytest.mark.slow)])
def test_low_rank_of_all_directions_is_the_full_one(rank):
  low = solve(QUERY, KEY, covariances="low_rank", rank=rank)
  full, diagonal = (solve(QUERY, KEY, covariances=c) for c in ("full", "diagonal"))
  for of_low, of_full, of_diagonal in zip(low, full, diagonal, strict=True):
    np.testing.assert_allclose(of_low, of_full, atol=1e-4)
    assert np.abs(of_full - of_diagonal).max() > 0.1


def test_low_rank_is_exact_where_the_other_side_varies_along_few_directions():
  rng = np.random.default_rng(0)
  dim, n, m = 12, 40, 30
  query = np.float32(rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim)) / 2 + 0.5)
  key = np.float32(rng.normal(size=(m, 3)) @ rng.normal(size=(3, dim)) / 2 + 0.3)
  query, key = jnp.asarray(query), jnp.asarray(key)
  expected = references.potential(query, key)
  size, mass = np.abs(expected).max(), references.masses(None, n)

  def error(query, key, **options):
    return np.abs(
      references.centred(potential(query, key, **options), mass) - expected
    ).max()

  assert error(query, key) < 1e-4 * size
  assert error(query, key, rank=3) < 1e-4 * size
  assert error(key, query, rank=3, side="key") < 1e-4 * size
  assert error(query, key, rank=1) > 0.01 * size
  assert error(query, key, covariances="diagonal") > 0.01 * size


def closed(logits, f, count):
  """Plan of `count` iterations from f, in the scaling domain of float64."""
  n, m = logits.shape
  kernel, rows = np.exp(logits - logits.max()), np.exp(f - f.max())
  for _ in range(count):
    columns = (n / m) / (kernel.T @ rows)
    rows = 1.0 / (kernel @ columns)
  return rows[:, None] * kernel * columns


def errors_after_one_closure(n, seed):
  """From samples of two Gaussians, the start and others, to the converged plan."""
  rng = np.random.default_rng(seed)
  query, key = (
    jnp.asarray(rng.normal(size=(n, DIM)) @ skew + shift, jnp.float32)
    for skew, shift in ((np.float64(SKEW), 1.0), (1.5 * np.float64(SKEW.T), -0.5))
  )
  logits = np.float64(query) @ np.float64(key).T
  # What half an iteration from zero gives, to the second order: V = B.
  second = references.quadratic(query, None, key, None, lambda a, b: b)
  starts = (potential(query, key, covariances="full"), second, np.zeros(n))
  best = closed(logits, np.zeros(n), 80)
  return [
    np.abs(closed(logits, np.float64(start), 1) - best).sum(-1).mean() / 2
    for start in starts
  ]


@pytest.mark.slow
def test_one_closure_is_enough_for_samples_of_gaussians():
  sizes = (32, 128, 512)
  found = [np.mean([errors_after_one_closure(n, s) for s in (0, 1)], 0) for n in sizes]
  # The moments of n points are known to one over the root of n.
  for fewer, more in itertools.pairwise(found):
    assert more[0] < 0.75 * fewer[0]
  assert found[-1][0] < 0.02
  for gaussian, second, zero in found:
    assert gaussian < 0.4 * min(second, zero)


SIZE, MORE = 8, 9
SMALL = np.random.default_rng(1).normal(size=(SIZE, 4))
OTHERS = np.random.default_rng(2).normal(size=(MORE, 4)) + 0.5
AXES = np.concatenate([np.eye(4), -np.eye(4)])
LINE = SMALL[:, :1] * [1.0, -2.0, 0.5, 1.0]
ONES = np.ones((SIZE, 4))
DEGENERATE = {
  "repeated tokens": (SMALL[[0, 0, 0, 0, 1, 1, 1, 1]], SMALL[[2, 2, 3, 3, 3, 3, 2, 2]]),
  "equal eigenvalues": (AXES, 2 * AXES),
  "equal eigenvalues of one side": (AXES, SMALL),
  "on a line": (LINE, 1 - 3 * LINE),
  "on two lines": (LINE, SMALL[:, 1:2] * [1.0, 1.0, 0.0, 2.0]),
  "at right angles": (SMALL * [1, 1, 0, 0], SMALL * [0, 0, 1, 1]),
  "constant queries": (ONES, SMALL),
  "constant keys": (SMALL, ONES),
  "nothing varies": (ONES, 0 * ONES),
  "sharp": (300 * SMALL, 3 * AXES),
  "sharp on a line": (40 * LINE, SMALL),
  "large and small": (1e8 * SMALL, 1e-8 * AXES),
  "nearly nothing": (1e-12 * SMALL, 1e-12 * SMALL),
}
COUNTS = {
  "fewer than dimensions": (3, 2),
  "one query": (1, MORE),
  "one key": (SIZE, 1),
  "one of each": (1, 1),
  "no query": (0, MORE),
  "no key": (SIZE, 0),
  "nothing": (0, 0),
}
NOBODY = np.zeros((1, 4))
# Points and masses of both sides.
CASES = {
  "all unlike": (
    *(SMALL, OTHERS),
    *(np.linspace(0.5, 2.0, size) * (np.arange(size) != 3) for size in (SIZE, MORE)),
  ),
  **{
    name: (query, np.vstack([key, NOBODY]), np.ones(SIZE), np.arange(MORE) < SIZE)
    for name, (query, key) in DEGENERATE.items()
  },
  **{
    name: (SMALL, OTHERS, np.arange(SIZE) < n, np.arange(MORE) < m)
    for name, (n, m) in COUNTS.items()
  },
}


@functools.partial(jax.jit, static_argnames="covariances")
def values_and_slopes(arguments, cotangents, covariances):
  """f and g, and the slopes of what the cotangents make of them."""

  def loss(arguments):
    found = both_sides(*arguments, covariances=covariances)
    return sum(map(jnp.vdot, cotangents, found)), found

  slopes, found = jax.grad(loss, has_aux=True)(arguments)
  return found, slopes


def reference_slopes(arguments, cotangents, covariances):
  """Central differences by queries, keys and masses, zero at absent points."""
  arguments = [np.asarray(each, np.float64) for each in arguments]
  present = [each > 0 for each in arguments[2:]]

  def loss(arguments):
    points, weights = arguments[:2], arguments[2:]
    return sum(
      cotangent @ references.potential(*points, weights, covariances, 2, side)
      for side, cotangent in zip(SIDES, cotangents, strict=True)
    )

  slopes = [np.zeros(array.shape) for array in arguments]
  for at, slope in enumerate(slopes):
    step = 1e-5 * max(np.abs(arguments[at]).max(), 1e-30)
    for index in np.ndindex(slope.shape):
      if present[at % 2][index[0]]:
        ends = []
        for sign in (1, -1):
          moved = [array.copy() for array in arguments]
          moved[at][index] += sign * step
          ends.append(loss(moved))
        slope[index] = (ends[0] - ends[1]) / (2 * step)
  return slopes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
  "covariances",
  [
    pytest.param("diagonal", marks=pytest.mark.slow),
    "low_rank",
    pytest.param("full", marks=pytest.mark.slow),
  ],
)
def test_values_and_gradients_whatever_the_points(covariances, name):
  arguments = CASES[name]
  present = [np.asarray(each) > 0 for each in arguments[2:]]
  cotangents = []
  for side in arguments[2:]:
    # The free constant must not count.
    mass = references.masses(side, len(side))
    cotangent = np.cos(3.0 * np.arange(len(mass))) * (mass > 0)
    cotangents.append(cotangent - mass * cotangent.sum())
  narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (arguments, cotangents))
  found, slopes = values_and_slopes(*narrow, covariances=covariances)
  points = [np.float64(each) for each in narrow[0]]
  rtol = 1e-3 if "sharp" in name else 2e-5
  assert_potentials(found, *points[:2], points[2:], covariances=covariances, rtol=rtol)
  expected = reference_slopes(points, cotangents, covariances)
  largest = max(np.abs(values).max() for values in found)
  # Float32 loses more in the product of covariances than in their potentials.
  rtol = {"sharp": 3e-3, "sharp on a line": 0.05}.get(name, 5e-4)
  for at, (one, other) in enumerate(zip(slopes, expected, strict=True)):
    one, seen = np.asarray(one), present[at % 2]
    assert np.isfinite(one).all()
    if at < 2:
      np.testing.assert_array_equal(one[~seen], 0.0)
    rounding = 1e-6 * largest / max(np.abs(points[at]).max(), 1e-30)
    atol = rtol * np.abs(other).max() + rounding
    np.testing.assert_allclose(one[seen], other[seen], atol=atol, err_msg=str(at))


@pytest.mark.slow
def test_sequences_of_one_token():
  for n, m in ((1, 1), (1, M), (N, 1)):
    for covariances in COVARIANCES:
      found = both_sides(QUERY[:n], KEY[:m], covariances=covariances)
      assert_potentials(found, QUERY[:n], KEY[:m], covariances=covariances)


def test_a_few_points_of_large_logits_leave_finite_potentials():
  # Covariances of rank one: entries of their product are large beside its eigenvalue.
  random = np.random.default_rng(0)
  query, key = (
    jnp.asarray(60.0 * random.normal(size=(3000, 2, 4)), jnp.float32) for _ in range(2)
  )

  def first(query, key):
    f = gaussian_potential(query, key, covariances="full")
    return f[0], f

  (_, f), slopes = jax.jit(jax.vmap(jax.value_and_grad(first, has_aux=True)))(
    query, key
  )
  assert np.isfinite(slopes).all()
  # For V lies below B: x V x <= x B x.
  x = query - query.mean(1, keepdims=True)
  spread = jnp.einsum("bnd,bmd->bnm", x, key - key.mean(1, keepdims=True))
  most = 0.5 * (spread**2).mean(-1) + jnp.abs(jnp.einsum("bnd,bd->bn", x, key.mean(1)))
  assert (jnp.abs(f - f.mean(-1, keepdims=True)) <= 1.01 * most + 1.0).all()
