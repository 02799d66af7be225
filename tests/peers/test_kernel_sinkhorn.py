"""Kernel-mode Sinkhorn against OTT-JAX, and half-steps against both ends of theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peer_cases import (
  BATCH,
  HEADS,
  JITTED,
  KEY,
  KEY_MASK,
  QUERY,
  QUERY_MASK,
  SCALE,
  VALUE,
  M,
  N,
  sown_weights,
)
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from scipy.special import logsumexp

from asap_jax import sinkhorn_attention
from asap_jax.metrics import column_error, row_error
from asap_jax.peers import kernel_sinkhorn_attention, sinkformer_attention
from asap_jax.teacher import starting_dual

INPUTS = QUERY, KEY, VALUE
kernel = JITTED["kernel_sinkhorn"]


def half_steps(count):
  return functools.partial(sinkformer_attention, half_steps=count)


@pytest.mark.parametrize("iterations", [1, 5])
def test_plan_is_that_of_ott_in_kernel_mode(iterations):
  logits = SCALE * jnp.einsum("bnhd,bmhd->bhnm", QUERY, KEY)
  solver = sinkhorn.Sinkhorn(
    lse_mode=False,
    inner_iterations=1,
    min_iterations=iterations,
    max_iterations=iterations,
  )

  @jax.jit
  @jax.vmap
  def solve(logits):
    geom = geometry.Geometry(cost_matrix=-logits, epsilon=1.0)
    return solver(linear_problem.LinearProblem(geom)).matrix

  expected = N * solve(logits.reshape(-1, N, M)).reshape(BATCH, HEADS, N, M)
  function = functools.partial(kernel_sinkhorn_attention, iterations=iterations)
  np.testing.assert_allclose(sown_weights(function, *INPUTS), expected, atol=1e-5)


def test_kernel_mode_is_sinkhorn():
  expected, actual = (
    JITTED[name](*INPUTS, iterations=5) for name in ("sinkhorn", "kernel_sinkhorn")
  )
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_large_logits_do_not_overflow_the_kernel():
  actual, expected = (kernel(*INPUTS, jnp.full((N, M), x)) for x in (500.0, 0.0))
  np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_row_that_underflows_attends_to_nothing():
  bias = jnp.zeros((N, M)).at[2].set(-200.0)
  out = kernel(*INPUTS, bias)
  np.testing.assert_array_equal(out[:, 2], 0)
  assert jnp.isfinite(out).all()


def test_one_half_step_is_softmax():
  expected = JITTED["softmax"](*INPUTS)
  actual = JITTED["sinkformer"](*INPUTS, half_steps=1)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_odd_half_steps_end_on_rows_and_even_ones_on_columns(count):
  weights = sown_weights(half_steps(count), *INPUTS)
  errors = float(row_error(weights).max()), float(column_error(weights).max())
  exact, other = errors if count % 2 else errors[::-1]
  assert exact < 1e-5
  assert other > 1e-2


def test_many_half_steps_converge_to_sinkhorn():
  expected = JITTED["sinkhorn"](*INPUTS, iterations=300)
  actual = JITTED["sinkformer"](*INPUTS, half_steps=601)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3])
def test_half_steps_from_the_gaussian_start(count):
  mask = QUERY_MASK[:, None, :, None] & KEY_MASK[:, None, None, :]
  function = functools.partial(sinkformer_attention, half_steps=count, start="gaussian")
  found = sown_weights(function, *INPUTS, mask=mask)
  start = jax.jit(functools.partial(starting_dual, "gaussian", side="key"))
  for b, h in np.ndindex(BATCH, HEADS):
    rows, columns = np.flatnonzero(QUERY_MASK[b]), np.flatnonzero(KEY_MASK[b])
    q, k = SCALE * QUERY[b, rows, h], KEY[b, columns, h]
    logits = np.float64(q) @ np.float64(k).T
    g = np.float64(start(q, k))
    for step in range(count):
      if step % 2 == 0:
        f = -logsumexp(logits + g, axis=1)
      else:
        share = len(rows) / len(columns)
        g = np.log(share) - logsumexp(logits + f[:, None], axis=0)
    expected = np.zeros((N, M))
    expected[np.ix_(rows, columns)] = np.exp(logits + f[:, None] + g)
    np.testing.assert_allclose(found[b, h], expected, atol=3e-5)


def test_one_half_step_from_a_start_is_half_an_iteration():
  options = {"start": "gaussian_full"}
  found, expected = (
    jax.jit(functools.partial(function, **options))(*INPUTS)
    for function, options in (
      (sinkformer_attention, {"half_steps": 1, **options}),
      (sinkhorn_attention, {"iterations": 0, **options}),
    )
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_counts_below_one_are_refused():
  with pytest.raises(ValueError, match=r"half_steps=0: expected at least one"):
    sinkformer_attention(*INPUTS, half_steps=0)
  with pytest.raises(ValueError, match=r"iterations=0: expected at least one full"):
    kernel_sinkhorn_attention(*INPUTS, iterations=0)


def test_an_unknown_start_is_refused(unchecked):
  with pytest.raises(ValueError, match=r"start='none': expected one of zero, gaussian"):
    sinkformer_attention(*INPUTS, start="none")
