"""Symmetries of one-dimensional potentials, on random problems full of ties."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers.oracles import WEIGHTS, M, N
from hypothesis import given
from hypothesis import strategies as st

from asap_jax.potentials.kantorovich import kantorovich_potentials

# Quarters make ties frequent, and float32 arithmetic on them exact.
quarters = st.integers(-16, 16).map(lambda k: np.float32(k / 4))


def lists(size):
  return st.lists(quarters, min_size=size, max_size=size).map(np.array)


kinds = st.sampled_from(["masks", "masses with zeros"])
seeds = st.integers(0, 2**31)
TOLERANCE = 1e-4
_solve = jax.jit(kantorovich_potentials)


def solve(x, y, x_weights, y_weights):
  arguments = (jnp.asarray(a) for a in (x, y, x_weights, y_weights))
  return jax.tree.map(np.asarray, _solve(*arguments))


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@given(lists(N), lists(M), kinds, seeds)
def test_permuting_the_points_permutes_the_potentials(x, y, kind, seed):
  rng = np.random.default_rng(seed)
  p, q = rng.permutation(N), rng.permutation(M)
  a, b = WEIGHTS[kind]
  phi, psi, _ = solve(x, y, a, b)
  moved = solve(x[p], y[q], a[p], b[q])
  assert_close(moved.phi, phi[p])
  assert_close(moved.psi, psi[q])


@given(st.permutations(range(N)), st.permutations(range(M)), kinds)
def test_permuting_distinct_points_permutes_the_transport(p, q, kind):
  x, y = np.arange(N, dtype=np.float32) ** 2, np.sqrt(np.arange(M, dtype=np.float32))
  a, b = WEIGHTS[kind]
  p, q = np.array(p), np.array(q)
  expected = solve(x, y, a, b).transport[p]
  assert_close(solve(x[p], y[q], a[p], b[q]).transport, expected)


@given(lists(N), lists(M), kinds, quarters, quarters)
def test_translating_the_points(x, y, kind, s, t):
  # -(x + s)(y + t) differs from -xy by terms in x alone and in y alone.
  a, b = WEIGHTS[kind]
  phi, psi, transport = solve(x, y, a, b)
  moved = solve(x + s, y + t, a, b)
  smallest = x[a > 0].min()
  assert_close(moved.phi, np.where(a > 0, phi - t * (x - smallest), 0))
  assert_close(moved.psi, np.where(b > 0, psi - s * y - t * (smallest + s), 0))
  assert_close(moved.transport, np.where(a > 0, transport + t, 0))


@given(lists(N), lists(M), kinds, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaling_the_points(x, y, kind, scale):
  weights = WEIGHTS[kind]
  result = solve(x, y, *weights)
  assert_close(solve(np.float32(scale) * x, y, *weights).phi, scale * result.phi)
  scaled = solve(x, np.float32(scale) * y, *weights)
  assert_close(scaled.psi, scale * result.psi)
  assert_close(scaled.transport, scale * result.transport)


@given(lists(N), lists(M), kinds)
def test_reflecting_both_sides(x, y, kind):
  # The cost is unchanged; only the point where phi is zero moves.
  a, b = WEIGHTS[kind]
  phi, psi, _ = solve(x, y, a, b)
  mirrored = solve(-x, -y, a, b)
  gauge = phi[a > 0][x[a > 0].argmax()]
  assert_close(mirrored.phi, np.where(a > 0, phi - gauge, 0))
  assert_close(mirrored.psi, np.where(b > 0, psi + gauge, 0))


@given(lists(N), lists(M), st.sampled_from(["equal", "masses"]), seeds)
def test_padding_anywhere_changes_nothing(x, y, kind, seed):
  rng = np.random.default_rng(seed)
  weights = WEIGHTS[kind]
  padded, at = [], []
  for values, weight in zip((x, y), weights, strict=True):
    size = len(values)
    where = np.sort(rng.permutation(size + 3)[:size])
    longer = rng.choice(np.float32([np.nan, np.inf, -np.inf, 99.0]), size + 3)
    longer[where] = values
    present = np.zeros(size + 3, bool if weight is None else np.float32)
    present[where] = True if weight is None else weight
    padded.append((longer, present))
    at.append(where)
  (x_, a_), (y_, b_) = padded
  a, b = (
    np.ones(s, bool) if w is None else w for w, s in zip(weights, (N, M), strict=True)
  )
  expected, actual = solve(x, y, a, b), solve(x_, y_, a_, b_)
  assert_close(actual.phi[at[0]], expected.phi)
  assert_close(actual.psi[at[1]], expected.psi)
  assert_close(actual.transport[at[0]], expected.transport)


@given(lists(N), lists(M), kinds)
def test_every_problem_is_solved_feasibly_and_tightly(x, y, kind):
  # Tight somewhere for every present point, or its potential could still be raised.
  a, b = WEIGHTS[kind]
  phi, psi, _ = solve(x, y, a, b)
  slack = (-np.outer(x, y) - phi[:, None] - psi)[np.ix_(a > 0, b > 0)]
  assert slack.min() > -TOLERANCE
  assert slack.min(0).max() < TOLERANCE
  assert slack.min(1).max() < TOLERANCE
