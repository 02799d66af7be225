"""Sorts and searches against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap_jax.potentials import sorting
from asap_jax.potentials.sorting import (
  bitonic_sort,
  first_of_equals,
  inverse,
  order_of,
  search,
  take,
)

SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, 1e-30, -3.5, 3.5, 3e38, -3e38])


def floats(*shape, seed=0):
  """Points with ties, both zeros, infinities and very large numbers."""
  rng = np.random.default_rng(seed)
  x = np.float32(np.round(rng.normal(size=shape), 1))
  return np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), x)


@pytest.fixture(params=["network", "XLA", "argsort"])
def method(request, monkeypatch):
  """One way to sort for all sizes; whatever the device."""
  monkeypatch.setattr(
    sorting, "_LEAST_ROWS", 0 if request.param == "network" else 2**30
  )
  monkeypatch.setattr(sorting, "_LEAST_NUMBERS", 0)
  if request.param == "argsort":
    monkeypatch.setattr(sorting, "_MOST_POINTS", 0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 64, 100])
def test_network_sorts_integers(n):
  rng = np.random.default_rng(n)
  limits = np.iinfo(np.int32)
  keys = rng.integers(limits.min, limits.max, (n, 2, 5), np.int32, endpoint=True)
  keys[:, 0, 0] = keys[0, 0, 0]
  keys[:, 1] = rng.integers(-2, 3, (n, 5))
  keys[-1, 0, 1] = limits.max
  np.testing.assert_array_equal(bitonic_sort(jnp.asarray(keys)), np.sort(keys, axis=0))


@given(st.integers(0, 2**16 - 1))
def test_network_sorts_zeros_and_ones(bits):
  # Which is to sort anything (Knuth, volume 3, section 5.3.4, theorem Z).
  row = (bits >> np.arange(16)) & 1
  keys = np.stack([np.roll(row, k) for k in range(16)], axis=1).astype(np.int32)
  np.testing.assert_array_equal(bitonic_sort(jnp.asarray(keys)), np.sort(keys, axis=0))


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("n", [1, 6, 17])
def test_order_is_that_of_a_stable_sort(n):
  x = floats(n, 20, 2)
  x[:, 0, 0], x[:, 1, 1] = np.inf, -np.inf
  expected = np.argsort(x, axis=0, kind="stable")
  np.testing.assert_array_equal(order_of(jnp.asarray(x)), expected)


@pytest.mark.parametrize("spread", [1e-3, 1e9, 1e30])
@pytest.mark.parametrize("n", [64, 1000])
def test_points_are_told_apart_however_far_others_are(n, spread):
  # Rounding to integers of the spread leaves all but one of them equal.
  rng = np.random.default_rng(n)
  x = np.float32(rng.normal(size=(n, 32)))
  x[rng.integers(n)] = spread
  expected = np.argsort(x, axis=0, kind="stable")
  np.testing.assert_array_equal(order_of(jnp.asarray(x)), expected)


def test_order_under_jit_vmap_and_grad():
  x = np.random.default_rng(3).normal(size=(5, 4, 9)).astype(np.float32)
  slope = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)

  def loss(x, slope):
    return jnp.vdot(take(x, order_of(x)), slope)

  value, gradient = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, slope)
  np.testing.assert_allclose(
    value, (np.sort(x, axis=1) * slope).sum((1, 2)), rtol=1e-5, atol=1e-5
  )
  expected = np.empty_like(x)
  np.put_along_axis(expected, np.argsort(x, axis=1), slope, 1)
  np.testing.assert_array_equal(gradient, expected)


def test_inverse_of_permutations():
  start = np.tile(np.arange(7)[:, None, None], (1, 3, 4))
  order = np.random.default_rng(5).permuted(start, axis=0)
  back = inverse(jnp.asarray(order, jnp.int32))
  np.testing.assert_array_equal(back, np.argsort(order, axis=0))
  labels = jnp.asarray(10 * start, jnp.int32)
  found = inverse(jnp.asarray(order, jnp.int32), labels)
  np.testing.assert_array_equal(found, 10 * np.argsort(order, axis=0))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_first_of_equals_is_a_search(row):
  row = np.sort(np.float32(row))
  ordered = np.stack([row, np.arange(row.size, dtype=np.float32)], axis=1)
  expected = np.stack([np.searchsorted(row, row), np.arange(row.size)], axis=1)
  np.testing.assert_array_equal(first_of_equals(jnp.asarray(ordered)), expected)


def test_infinite_numbers_are_no_run_of_equals():
  ordered = jnp.array([1.0, 1.0, jnp.inf, jnp.inf])[:, None]
  assert first_of_equals(ordered)[:, 0].tolist() == [0, 0, 2, 3]


@given(
  st.lists(st.integers(-5, 5), min_size=1, max_size=9),
  st.lists(st.integers(-6, 6), min_size=1, max_size=5),
)
def test_search_is_numpys(ordered, values):
  ordered, values = np.sort(np.int32(ordered)), np.int32(values)
  both = np.stack([ordered, ordered + 1], axis=1)
  actual = search(jnp.asarray(both), jnp.asarray(values)[:, None])
  expected = [np.searchsorted(sequence, values) for sequence in both.T]
  np.testing.assert_array_equal(actual, np.stack(expected, axis=1))


def test_large_batches_are_sorted_by_the_network_on_a_cpu_alone():
  large = jax.ShapeDtypeStruct((64, 512), jnp.float32)

  def operations(platform):
    lowered = jax.jit(order_of).trace(large).lower(lowering_platforms=(platform,))
    return "stablehlo.sort" in lowered.as_text()

  assert not operations("cpu")
  assert operations("cuda")
