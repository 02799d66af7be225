"""Names of starts, and the duals that they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gaussian_references as references
from helpers.oracles import WEIGHTS, M, N, on_device

from asap_jax.teacher import starting_dual

DIM = 6
KEYS = jax.random.split(jax.random.key(0))
QUERY = 2.0 * jax.random.normal(KEYS[0], (N, DIM)) + 0.5
KEY = jax.random.normal(KEYS[1], (M, DIM)) - 0.2
WEIGHTS_OF_BOTH = on_device(WEIGHTS["masses with zeros"])

dual = jax.jit(starting_dual, static_argnums=0, static_argnames="side")


@pytest.mark.parametrize("side", ["query", "key"])
def test_zero(side):
  found = dual("zero", QUERY, KEY, *WEIGHTS_OF_BOTH, side=side)
  mass = np.asarray(WEIGHTS_OF_BOTH[side == "key"])
  np.testing.assert_allclose(found, np.log(np.where(mass > 0, mass, 1.0)), rtol=1e-6)
  batch = jnp.ones((2, 3, N, DIM), jnp.bfloat16), jnp.ones((2, 3, M, DIM), jnp.bfloat16)
  found = jax.eval_shape(functools.partial(starting_dual, "zero", side=side), *batch)
  assert found.shape == (2, 3, N if side == "query" else M)
  assert found.dtype == jnp.float32


@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("covariances", ["diagonal", "full"])
def test_named_covariances_in_float64(covariances, side):
  weights = WEIGHTS["masses with zeros"]
  found = dual(f"gaussian_{covariances}", QUERY, KEY, *WEIGHTS_OF_BOTH, side=side)
  expected = references.potential(QUERY, KEY, weights, covariances, side=side)
  mass = references.masses(weights[side == "key"], len(expected))
  size = np.abs(expected).max()
  of_masses = np.log(np.where(mass > 0, mass, 1.0))
  found = np.asarray(found)
  np.testing.assert_allclose(
    references.centred(found - of_masses, mass), expected, atol=5e-5 * size
  )
  np.testing.assert_array_equal(found[mass == 0], 0.0)


@pytest.mark.parametrize("side", ["query", pytest.param("key", marks=pytest.mark.slow)])
def test_gaussian_is_the_low_rank_of_four(side):
  found = dual("gaussian", QUERY, KEY, side=side)
  low, lower = (
    references.potential(QUERY, KEY, covariances="low_rank", rank=rank, side=side)
    for rank in (4, 3)
  )
  size, mass = np.abs(low).max(), references.masses(None, len(low))
  np.testing.assert_allclose(references.centred(found, mass), low, atol=5e-5 * size)
  assert np.abs(low - lower).max() > 5e-3 * size
  named = dual("gaussian_low_rank", QUERY, KEY, side=side)
  np.testing.assert_array_equal(named, found)


@pytest.mark.parametrize("name", ["gauss", "gaussian_", "gaussian_none", "full", ""])
def test_unknown_names(unchecked, name):
  expected = "zero, gaussian, gaussian_diagonal, gaussian_low_rank, gaussian_full"
  with pytest.raises(ValueError, match=f"start='{name}': expected one of {expected}"):
    starting_dual(name, QUERY, KEY)


def test_errors_of_the_potential_come_through(unchecked):
  with pytest.raises(ValueError, match=r"query_weights has shape \(9,\)"):
    starting_dual("gaussian", QUERY, KEY, jnp.ones(M))
  with pytest.raises(ValueError, match="side='both': expected one of"):
    starting_dual("gaussian", QUERY, KEY, side="both")
