"""What must not change Gaussian potentials: order, padding, batch, dtype, shifts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gaussian_references import COVARIANCES, SIDES
from helpers.oracles import KEY_MASK, QUERY_MASK, WEIGHTS, M, N, on_device
from hypothesis import given
from hypothesis import strategies as st

from asap_jax import closure, gaussian_potential, plan

DIM = 9
KEYS = jax.random.split(jax.random.key(0), 4)
SKEW = jax.random.normal(KEYS[3], (DIM, DIM)) / 3
QUERY = jax.random.normal(KEYS[0], (N, DIM)) @ SKEW + 0.5
KEY = 1.5 * jax.random.normal(KEYS[1], (M, DIM)) @ SKEW.T - 0.2
MASSES = on_device(WEIGHTS["masses with zeros"])
TOLERANCE = 2e-4


def eager(query, key, *weights):
  """All potentials, by covariances and side."""
  return {
    (covariances, side): gaussian_potential(
      query, key, *weights, covariances=covariances, rank=2, side=side
    )
    for covariances, side in itertools.product(COVARIANCES, SIDES)
  }


solve = jax.jit(eager)


def assert_close(found, expected, tolerance=TOLERANCE):
  for name in expected:
    np.testing.assert_allclose(
      found[name], expected[name], atol=tolerance, err_msg=str(name)
    )


@pytest.mark.slow
@given(st.permutations(range(N)), st.permutations(range(M)))
def test_order_of_tokens(rows, columns):
  rows, columns = jnp.array(rows), jnp.array(columns)
  a, b = MASSES
  found = solve(QUERY[rows], KEY[columns], a[rows], b[columns])
  expected = {
    (covariances, side): value[rows if side == "query" else columns]
    for (covariances, side), value in solve(QUERY, KEY, a, b).items()
  }
  assert_close(found, expected)


@given(st.integers(0, 2**31))
def test_maps_that_leave_the_logits_alone(seed):
  # Any matrix for all covariances; scales of coordinates for the diagonal; for the low
  # rank, whose directions are fixed at first, one scale.
  rng = np.random.default_rng(seed)
  turn, other = np.linalg.qr(rng.normal(size=(2, DIM, DIM)))[0]
  scales = np.exp(rng.uniform(-0.7, 0.7, DIM))
  expected = solve(QUERY, KEY)
  for covariances, moved in (
    ("full", turn * scales @ other),
    ("diagonal", np.diag(scales)),
    ("low_rank", scales[0] ** 4 * np.eye(DIM)),
  ):
    query = QUERY @ jnp.asarray(moved, jnp.float32)
    key = KEY @ jnp.asarray(np.linalg.inv(moved).T, jnp.float32)
    found = solve(query, key)
    for side in SIDES:
      at = covariances, side
      np.testing.assert_allclose(found[at], expected[at], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("covariances", COVARIANCES)
def test_constant_vectors_do_not_change_the_plan(covariances):
  shift = jnp.array([3.0, -2.0, 1.0, 4.0, -5.0, 0.0, 2.0, -1.0, 3.0])
  potential = functools.partial(gaussian_potential, covariances=covariances, rank=2)

  @jax.jit
  def f_and_plan(query, key):
    f, logits = potential(query, key), query @ key.T
    return f, plan(logits, closure(logits, f))

  f, weights = f_and_plan(QUERY, KEY)
  of_queries, found = f_and_plan(QUERY + shift, KEY)
  np.testing.assert_allclose(found, weights, atol=1e-4)
  np.testing.assert_allclose(of_queries - of_queries[0], f - f[0], atol=1e-3)
  of_keys, found = f_and_plan(QUERY, KEY + shift)
  np.testing.assert_allclose(found, weights, atol=1e-4)
  linear = f - QUERY @ shift
  np.testing.assert_allclose(of_keys - of_keys[0], linear - linear[0], atol=1e-3)


def test_large_means_cost_little_precision():
  shift = jnp.array([100.0, -50.0, 30.0, 80.0, -100.0, 0.0, 60.0, -70.0, 90.0])
  expected, found = solve(QUERY, KEY), solve(QUERY + shift, KEY)
  for (covariances, side), value in expected.items():
    moved = found[covariances, side]
    if side == "key":
      moved = moved + KEY @ shift
    difference = moved - value
    size = float(np.abs(value).max())
    np.testing.assert_allclose(difference, difference.mean(), atol=2e-3 * size)


COTANGENTS = {"query": jnp.cos(jnp.arange(float(N))), "key": jnp.sin(jnp.arange(9.0))}


@jax.jit
def values_and_slopes(query, key, *weights):
  """All potentials, and the gradients of a number that all count in."""

  def loss(query, key):
    found = eager(query, key, *weights)
    return sum(jnp.vdot(COTANGENTS[s], value) for (_, s), value in found.items()), found

  slopes, found = jax.grad(loss, (0, 1), has_aux=True)(query, key)
  return found, slopes


@pytest.mark.slow
@pytest.mark.parametrize(
  "kind", ["masses with zeros", pytest.param("masks", marks=pytest.mark.slow)]
)
def test_absent_points_may_hold_anything(kind):
  weights = on_device(WEIGHTS[kind])
  masks = [weight[:, None] > 0 for weight in weights]

  def padded(content):
    points = zip(masks, (QUERY, KEY), strict=True)
    return [jnp.where(mask, each, content) for mask, each in points]

  expected, expected_slopes = values_and_slopes(*padded(0.0), *weights)
  for content in (jnp.nan, jnp.inf, -1e30):
    found, slopes = values_and_slopes(*padded(content), *weights)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, slopes, expected_slopes)
  for slope, mask in zip(expected_slopes, masks, strict=True):
    np.testing.assert_array_equal(jnp.where(mask, 0.0, slope), 0.0)
    assert jnp.isfinite(slope).all()
    assert jnp.abs(slope).max() > 0.1


def test_padding_is_as_if_it_were_not_there():
  rows, columns = np.flatnonzero(QUERY_MASK), np.flatnonzero(KEY_MASK)
  found = solve(QUERY, KEY, *on_device((QUERY_MASK, KEY_MASK)))
  found = {
    (covariances, side): value[rows if side == "query" else columns]
    for (covariances, side), value in found.items()
  }
  assert_close(found, solve(QUERY[rows], KEY[columns]))


def test_masks_and_equal_masses_are_one():
  expected = solve(QUERY, KEY)
  ones = jnp.ones(N, bool), jnp.ones(M, bool)
  assert_close(solve(QUERY, KEY, *ones), expected)
  assert_close(solve(QUERY, KEY, jnp.full(N, 7.0), jnp.full(M, 0.1)), expected)


def batches():
  """Queries, keys and masks of the queries."""
  queries = jnp.stack([QUERY, 2.0 * QUERY[::-1], QUERY - 3.0])
  keys = jnp.stack([KEY, -KEY, 0.3 * KEY])
  return queries, keys, jnp.arange(N) < jnp.array([[6], [4], [5]])


@pytest.mark.slow
def test_a_batch_is_its_elements():
  together = solve(*batches())
  for index, alone in enumerate(zip(*batches(), strict=True)):
    assert_close({at: value[index] for at, value in together.items()}, solve(*alone))


@pytest.mark.slow
def test_vmap_shared_masks_and_no_jit_change_nothing():
  queries, keys, masks = batches()
  mapped = jax.jit(jax.vmap(eager))(queries, keys, masks)
  assert_close(mapped, solve(queries, keys, masks))
  assert_close(eager(QUERY, KEY, masks[1]), solve(QUERY, KEY, masks[1]))
  # One mask for the batch, and more batch axes than it has.
  shared = solve(queries[:, None], keys[:, None], masks[1][None, None])
  for index in range(3):
    alone = solve(queries[index], keys[index], masks[1])
    assert_close({at: value[index, 0] for at, value in shared.items()}, alone)


@pytest.mark.parametrize(
  "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)]
)
def test_low_precision_is_raised_before_anything_else(dtype):
  low = QUERY.astype(dtype), KEY.astype(dtype)
  # Operation by operation: XLA may round two programs differently.
  with jax.disable_jit():
    found = solve(*low)
    expected = solve(*(points.astype(jnp.float32) for points in low))
  for at, value in found.items():
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, expected[at])
  unrounded = solve(QUERY, KEY)
  for (covariances, side), value in found.items():
    exact = unrounded[covariances, side]
    # The directions of a low rank are those of the rounded points.
    share = 0.15 if covariances == "low_rank" else 0.03
    np.testing.assert_allclose(value, exact, atol=share * float(np.abs(exact).max()))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"rank": 0}, "rank=0: expected at least one direction"),
    ({"rank": -1, "covariances": "diagonal"}, "rank=-1: expected at least one"),
    ({"covariances": "half"}, r"covariances='half': expected one of \('diagonal', "),
    ({"side": "both"}, r"side='both': expected one of \('query', 'key'\)"),
    ({"key": KEY[:, :2]}, r"key \(9, 2\): expected the same last dimension"),
    ({"query": QUERY[0]}, r"query \(9,\) and key \(9, 9\): expected \[..., length"),
    (
      {"query_weights": jnp.ones(M)},
      r"query_weights has shape \(9,\): .* 6\]",
    ),
    ({"key_weights": jnp.ones(N)}, r"key_weights has shape \(6,\): expected .* 9\]"),
    (
      {"query_weights": jnp.ones(N), "key_weights": jnp.ones(M), "side": "neither"},
      "side='neither'",
    ),
    ({"key_weights": jnp.ones(M, int)}, "key_weights has dtype int32: expected"),
  ],
)
def test_bad_input_is_named(unchecked, options, message):
  with pytest.raises(ValueError, match=message):
    gaussian_potential(**({"query": QUERY, "key": KEY} | options))
