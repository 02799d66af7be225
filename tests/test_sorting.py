"""Sorts and searches against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asap_jax import sorting
from asap_jax.sorting import ascending, ascending_pair, bitonic_sort, search

SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, 1e-30, -3.5, 3.5, np.nan])


def floats(rows, n, seed=0):
  """Rows with ties, both zeros, infinities and (positive) NaN among the numbers."""
  rng = np.random.default_rng(seed)
  x = np.float32(np.round(rng.normal(size=(rows, n)), 1))
  return np.where(rng.random((rows, n)) < 0.2, rng.choice(SPECIAL, (rows, n)), x)


@pytest.fixture(params=["network", "XLA"])
def method(request, monkeypatch):
  """The network for all sizes, or for none; whatever the device."""
  monkeypatch.setattr(sorting, "_LEAST_ROWS", 0)
  most = 0 if request.param == "XLA" else 4096
  monkeypatch.setattr(sorting, "_MOST_POINTS", most)
  monkeypatch.setattr(sorting, "_LEAST_NUMBERS", 0)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 64, 100])
def test_network_sorts_integers(n):
  rng = np.random.default_rng(n)
  limits = np.iinfo(np.int32)
  keys = rng.integers(limits.min, limits.max, (2, 5, n), np.int32, endpoint=True)
  keys[0, 0] = keys[0, 0, 0]
  keys[1] = rng.integers(-2, 3, (5, n))
  keys[0, 1, -1] = limits.max
  np.testing.assert_array_equal(bitonic_sort(jnp.asarray(keys)), np.sort(keys))


@given(st.integers(0, 2**16 - 1))
def test_network_sorts_zeros_and_ones(bits):
  # Which is to sort anything (Knuth, volume 3, section 5.3.4, theorem Z).
  row = (bits >> np.arange(16)) & 1
  rows = np.stack([np.roll(row, k) for k in range(16)]).astype(np.int32)
  np.testing.assert_array_equal(bitonic_sort(jnp.asarray(rows)), np.sort(rows))


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("n", [1, 6, 16])
def test_ascending_of_any_floats(n):
  x = floats(7, n).reshape(7, 1, n)
  np.testing.assert_array_equal(ascending(jnp.asarray(x)), np.sort(x))


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("m", [6, 9])
def test_a_pair_is_sorted_like_each(m):
  x, y = floats(3, 6), floats(8, m, seed=1).reshape(2, 4, m)
  pair = ascending_pair(jnp.asarray(x), jnp.asarray(y))
  for ours, theirs in zip(pair, (np.sort(x), np.sort(y)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("method")
def test_jit_vmap_and_grad():
  x = np.random.default_rng(3).normal(size=(5, 4, 9)).astype(np.float32)
  slope = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)

  def loss(x, slope):
    return jnp.vdot(ascending(x), slope)

  value, gradient = jax.jit(jax.vmap(jax.value_and_grad(loss)))(x, slope)
  np.testing.assert_allclose(
    value, (np.sort(x) * slope).sum((1, 2)), rtol=1e-5, atol=1e-5
  )
  expected = np.empty_like(x)
  np.put_along_axis(expected, np.argsort(x), slope, -1)
  np.testing.assert_array_equal(gradient, expected)


@given(
  st.lists(st.integers(-5, 5), min_size=1, max_size=9),
  st.lists(st.integers(-6, 6), min_size=1, max_size=5),
)
def test_search_is_numpys(ordered, values):
  ordered, values = np.sort(np.int32(ordered)), np.int32(values)
  rows = np.stack([ordered, ordered + 1])
  actual = search(jnp.asarray(rows), jnp.asarray(values)[None])
  expected = np.stack([np.searchsorted(row, values) for row in rows])
  np.testing.assert_array_equal(actual, expected)


def test_large_batches_are_sorted_by_the_network_on_a_cpu_alone():
  large = jax.ShapeDtypeStruct((512, 64), jnp.float32)

  def operations(platform):
    lowered = jax.jit(ascending).trace(large).lower(lowering_platforms=(platform,))
    return "stablehlo.sort" in lowered.as_text()

  assert not operations("cpu")
  assert operations("cuda")
