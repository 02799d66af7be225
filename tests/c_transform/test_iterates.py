"""Closures whose way is kept: against float64, and where they stop against OTT-JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from asap_jax.c_transform.iterates import scaled_iterates
from asap_jax.metrics import column_error
from asap_jax.teacher.sinkhorn import sinkhorn_source_dual

BATCH, N, M, COUNT = 4, 8, 6, 15
RANDOM = np.random.default_rng(0)
# Of several sharpnesses: the more, the more iterations.
LOGITS = jnp.asarray(
  RANDOM.normal(size=(BATCH, N, M)) * np.array([0.1, 1.0, 3.0, 20.0])[:, None, None],
  jnp.float32,
)
F = jnp.asarray(RANDOM.normal(size=(BATCH, N)), jnp.float32)
MASKS = jnp.arange(N) < jnp.array([[8], [5], [8], [6]]), None

iterate = jax.jit(scaled_iterates, static_argnums=2, static_argnames="tolerance")


@pytest.mark.parametrize("masks", [(None, None), MASKS], ids=["whole", "masked"])
def test_duals_on_the_way_against_float64(masks):
  _, found = iterate(LOGITS, F, 4, *masks)
  assert found.active is None
  for b in range(BATCH):
    own = [None if mask is None else np.asarray(mask[b]) for mask in masks]
    rows = np.ones(N, bool) if own[0] is None else own[0]
    logits, f = np.float64(LOGITS[b]), np.float64(F[b])
    for count in range(4):
      np.testing.assert_allclose(found.f[count, b][rows], f[rows], atol=1e-4)
      f, g = oracles.closures(logits, f, 1, *own, [])
      np.testing.assert_allclose(found.g[count, b], g, atol=1e-4)


def test_stops_where_ott_does():
  tolerance = 1e-2
  scaled, iterates = iterate(LOGITS, F, COUNT, tolerance=tolerance)
  solver = sinkhorn.Sinkhorn(
    threshold=tolerance,
    inner_iterations=1,
    min_iterations=0,
    max_iterations=COUNT,
    implicit_diff=None,
  )
  for b in range(BATCH):
    problem = linear_problem.LinearProblem(
      geometry.Geometry(cost_matrix=-LOGITS[b], epsilon=1.0)
    )
    taken = int(solver(problem, init=(F[b], jnp.zeros(M))).n_iters)
    assert int(iterates.active[:, b].sum()) == taken
  errors = np.asarray(column_error(scaled.dense())).mean(-1)
  stopped = np.asarray(iterates.active.sum((0, 2))) < COUNT
  assert list(stopped) == [True, True, True, False]
  assert (errors[stopped] <= tolerance).all()
  assert errors[-1] > tolerance


def test_a_loose_tolerance_leaves_one_closure_and_none_leaves_all():
  _, one = iterate(LOGITS, F, COUNT, tolerance=100.0)
  assert (np.asarray(one.active.sum((0, 2))) == 1).all()
  strict, all_ = iterate(LOGITS[-1:], F[-1:], 5, tolerance=1e-30)
  plain, _ = iterate(LOGITS[-1:], F[-1:], 5)
  assert all_.active.all()
  np.testing.assert_allclose(strict.dense(), plain.dense(), atol=1e-6)


def test_the_source_dual_is_that_of_each_elements_last_iteration():
  source = jax.jit(
    functools.partial(sinkhorn_source_dual, iterations=COUNT, tolerance=1e-2)
  )(LOGITS, init=F)
  _, iterates = iterate(LOGITS, F, COUNT, tolerance=1e-2)
  counts = np.asarray(iterates.active.sum((0, 2)))
  assert len(set(counts)) > 2
  for b, count in enumerate(counts):
    f = np.float64(F[b])
    for _ in range(count - 1):
      f, _ = oracles.closures(np.float64(LOGITS[b]), f, 1, None, None, [])
    np.testing.assert_allclose(source[b], f, atol=2e-4)


def test_second_derivatives_of_what_was_run():
  tangent = jnp.asarray(RANDOM.normal(size=LOGITS.shape), jnp.float32)

  def slope(logits):
    def loss(logits):
      scaled, _ = scaled_iterates(logits, F, COUNT, tolerance=1e-2)
      return jnp.square(scaled.dense()).sum()

    return jax.grad(loss)(logits)

  found = jax.jit(jax.grad(lambda x: jnp.vdot(tangent, slope(x))))(LOGITS)
  step = 1e-3
  ends = [jax.jit(slope)(LOGITS + sign * step * tangent) for sign in (1, -1)]
  wanted = (ends[0] - ends[1]) / (2 * step)
  np.testing.assert_allclose(found, wanted, atol=2e-2)
