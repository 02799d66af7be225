"""The gradient through fixed iterations, against that of OTT-JAX unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from asap_jax.teacher.sinkhorn import sinkhorn_duals

N, M = 7, 5
KEYS = jax.random.split(jax.random.key(0), 6)
QUERY_MASK = jnp.arange(N) < jnp.array([[7], [4]])
KEY_MASK = jnp.arange(M) < jnp.array([[3], [5]])
F_BAR = jax.random.normal(KEYS[0], (2, N))
G_BAR = jax.random.normal(KEYS[1], (2, M))


def ott_unrolled(logits, iterations, a, b, init):
  """Sum of OTT's duals against fixed weights, its absent points left out."""
  solver = sinkhorn.Sinkhorn(
    # One block: OTT 0.6 differentiates several blocks of a fixed number wrongly.
    inner_iterations=iterations,
    min_iterations=iterations,
    max_iterations=iterations,
    threshold=0.0,
    implicit_diff=None,
  )

  def solve(logits, a, b, init):
    problem = linear_problem.LinearProblem(
      geometry.Geometry(cost_matrix=-logits, epsilon=1.0), a=a, b=b
    )
    start = jnp.where(a > 0, init, -jnp.inf), jnp.zeros(M)
    output = solver(problem, init=start)
    return jnp.where(a > 0, output.f, 0.0), jnp.where(b > 0, output.g, 0.0)

  f, g = jax.vmap(solve)(logits, a, b, init)
  return (f * F_BAR).sum() + (g * G_BAR).sum()


def ours(logits, iterations, query_weights, key_weights, init):
  f, g = sinkhorn_duals(logits, iterations, query_weights, key_weights, init)
  return (f * F_BAR).sum() + (g * G_BAR).sum()


def masses(weights, shape):
  weights = jnp.ones(shape) if weights is None else weights.astype(jnp.float32)
  return weights / weights.sum(-1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [pytest.param(1, marks=pytest.mark.slow), 2, 7])
@pytest.mark.parametrize(
  "masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "masked"]
)
# At scale 1 the scaling domain serves, at 60 its range would not do.
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_gradient_of_logits_and_start_is_that_of_ott_unrolled(
  scale, masked, iterations
):
  logits = scale * jax.random.normal(KEYS[2], (2, N, M))
  init = 0.3 * scale * jax.random.normal(KEYS[3], (2, N))
  weights = (QUERY_MASK, KEY_MASK) if masked else (None, None)
  a, b = masses(weights[0], (2, N)), masses(weights[1], (2, M))
  expected = jax.grad(ott_unrolled, (0, 4))(logits, iterations, a, b, init)
  found = jax.grad(ours, (0, 4))(logits, iterations, *weights, init)
  for got, want in zip(found, expected, strict=True):
    largest = np.abs(want).max()
    # OTT centres sharp logits by the duals, which costs some digits of its own.
    np.testing.assert_allclose(got, want, atol=1e-4 * largest + 1e-6)


@pytest.mark.slow
def test_gradient_of_masses_is_that_of_ott_unrolled():
  logits = jax.random.normal(KEYS[2], (2, N, M))
  a, b = (
    masses(jax.random.uniform(key, shape) + 0.1, shape)
    for key, shape in ((KEYS[4], (2, N)), (KEYS[5], (2, M)))
  )
  init = jnp.zeros((2, N))

  # Masses are normalised inside ours: only changes that keep the sum are compared.
  def tangent(gradient):
    return gradient - gradient.mean(-1, keepdims=True)

  expected = jax.grad(ott_unrolled, (2, 3))(logits, 4, a, b, init)
  found = jax.grad(ours, (2, 3))(logits, 4, a, b, init)
  for got, want, mass in zip(found, expected, (a, b), strict=True):
    normalised = want - (want * mass).sum(-1, keepdims=True)
    np.testing.assert_allclose(tangent(got), tangent(normalised), atol=2e-5)


def test_padding_has_no_gradient_and_none_is_nan():
  logits = jax.random.normal(KEYS[2], (2, N, M))
  pairs = QUERY_MASK[..., None] & KEY_MASK[:, None]
  holed = jnp.where(pairs, logits, jnp.nan)
  gradient = jax.grad(ours)(holed, 5, QUERY_MASK, KEY_MASK, None)
  assert np.isfinite(gradient).all()
  assert np.all(np.asarray(gradient)[~np.asarray(pairs)] == 0.0)
  assert np.abs(gradient).max() > 1e-3


@pytest.mark.slow
def test_vmap_mixes_sharp_and_smooth_problems():
  logits = jax.random.normal(KEYS[2], (2, N, M)) * jnp.array([1.0, 60.0])[:, None, None]

  def loss(logits):
    return jnp.sin(sinkhorn_duals(logits, 5).f).sum()

  together = jax.vmap(jax.grad(loss))(logits)
  for one, alone in zip(together, map(jax.grad(loss), logits), strict=True):
    np.testing.assert_allclose(one, alone, atol=1e-4)


def test_memory_does_not_grow_with_the_iterations():
  logits = jax.ShapeDtypeStruct((64, 64), jnp.float32)

  def temporary_bytes(iterations):
    loss = lambda x: sinkhorn_duals(x, iterations).f.sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(logits).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Duals of an iteration take 512 bytes; matrices would take 16,384 each.
  assert temporary_bytes(40) - temporary_bytes(10) < 30 * 16_384 / 2
