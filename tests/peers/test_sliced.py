"""Sliced plans: exact marginals, optimal couplings, and the two ways to use them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.peer_cases import (
  BATCH,
  CASES,
  DIM,
  DIRECTIONS,
  HEADS,
  KEY,
  KEY_MASK,
  QUERY,
  QUERY_MASK,
  SLICES,
  VALUE,
  M,
  N,
  forms_matrix,
  normal,
  sown_weights,
)
from hypothesis import given
from hypothesis import strategies as st

from asap_jax.metrics import column_error, row_error
from asap_jax.peers import est_attention, swgg_attention
from asap_jax.peers.coupling import couple

INPUTS = QUERY, KEY, VALUE
MASK = QUERY_MASK[:, None, :, None] & KEY_MASK[:, None, None]
counted = jax.jit(
  lambda query, key, rows, columns: couple(
    query, key, None, jnp.arange(8) < rows, jnp.arange(8) < columns
  ).dense()
)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_coupling_is_feasible_and_optimal_for_any_counts(rows, columns, seed):
  x, y = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
  plan = counted(x[None, :, None], y[None, :, None], rows, columns)[0]
  np.testing.assert_array_equal(plan[rows:], 0)
  np.testing.assert_array_equal(plan[:, columns:], 0)
  plan = np.float64(plan[:rows, :columns])
  np.testing.assert_allclose(plan.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(plan.sum(0), rows / columns, rtol=1e-6)
  costs = -np.outer(x[:rows], y[:columns]).astype(np.float64)
  a, b = np.full(rows, 1 / rows), np.full(columns, 1 / columns)
  expected = oracles.transport_cost(costs, a, b)
  np.testing.assert_allclose((plan * costs).sum() / rows, expected, atol=1e-6)


def test_no_valid_token_gives_no_attention():
  x = np.ones((1, 8, 1), np.float32)
  for counts in ((0, 3), (3, 0), (0, 0)):
    np.testing.assert_array_equal(counted(x, x, *counts), 0)


@pytest.mark.parametrize("function", [swgg_attention, est_attention])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_doubly_stochastic(function, masked):
  weights = sown_weights(function, *INPUTS, mask=MASK if masked else None)
  rows, columns = (QUERY_MASK, KEY_MASK) if masked else (None, None)
  if masked:
    weights, rows, columns = weights[:, :, :, :], rows[:, None], columns[:, None]
  error = row_error(weights)
  error = error if rows is None else jnp.where(rows, error, weights.sum(-1))
  np.testing.assert_allclose(error, 0, atol=1e-5)
  np.testing.assert_allclose(column_error(weights, rows, columns), 0, atol=1e-5)


def test_swgg_is_a_permutation_between_equal_numbers():
  weights = sown_weights(swgg_attention, QUERY, KEY[:, :N], VALUE[:, :N])
  assert set(np.unique(weights)) == {0.0, 1.0}
  np.testing.assert_array_equal(weights.sum(-1), 1)
  np.testing.assert_array_equal(weights.sum(-2), 1)


def test_swgg_costs_no_more_than_any_slice():
  logits = np.einsum("bnhd,bmhd->bhnm", QUERY, KEY)

  def cost(directions):
    function = functools.partial(swgg_attention, directions=directions)
    return -(sown_weights(function, *INPUTS) * logits).sum((-2, -1))

  each = np.stack([cost(DIRECTIONS[:, i : i + 1]) for i in range(SLICES)])
  np.testing.assert_allclose(cost(DIRECTIONS), each.min(0), rtol=1e-5)
  assert (each.max(0) > each.min(0) + 0.1).any()


def test_est_tends_to_swgg():
  est, swgg = CASES["est"], CASES["swgg"]
  sharp = est(*INPUTS, inverse_temperature=jnp.float32(1e4))
  np.testing.assert_allclose(sharp, swgg(*INPUTS), atol=1e-4)


def test_est_at_zero_is_the_mean_over_slices():
  def along(directions):
    return CASES["est"](*INPUTS, directions=directions, inverse_temperature=0.0)

  parts = [along(DIRECTIONS[:, i : i + 1]) for i in range(SLICES)]
  np.testing.assert_allclose(along(DIRECTIONS), sum(parts) / SLICES, atol=1e-5)


def test_swgg_has_no_gradient_but_in_the_values():
  (inputs, learned), _ = CASES["swgg"].gradient(INPUTS, {"directions": DIRECTIONS})
  query, key, value = inputs
  for slope in (query, key, learned["directions"]):
    np.testing.assert_array_equal(slope, 0)
  assert np.abs(value).max() > 0.1


def test_bias_of_padding_may_be_infinite():
  bias = jnp.where(MASK, normal(BATCH, HEADS, N, M), -jnp.inf)
  est = CASES["est"]
  expected = est(*INPUTS, jnp.where(MASK, bias, 0.0), mask=MASK)
  np.testing.assert_array_equal(est(*INPUTS, bias, mask=MASK), expected)
  assert jnp.isfinite(expected).all()


@pytest.mark.parametrize("function", [swgg_attention, est_attention])
def test_no_matrix_of_queries_by_keys_is_formed(function):
  query, key = normal(1, 31, HEADS, DIM), normal(1, 37, HEADS, DIM)
  assert not forms_matrix(function, query, key, key)


def test_directions_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"directions have shape \(1, 3, 4\).*\[2, "):
    swgg_attention(*INPUTS, directions=DIRECTIONS[:1])
