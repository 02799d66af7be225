"""Potentials in operators of ONNX are those that a CPU computes."""

import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax.potentials import on_cpu, on_onnx

RANDOM = np.random.default_rng(0)


def points(size):
  """Sequences with equal points among them."""
  return jnp.asarray(RANDOM.integers(-9, 9, size=(3, size)) / 4.0, jnp.float32)


def mask(size):
  return jnp.arange(size) < jnp.asarray([[size], [size - 3], [2]])


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 6), (5, 9)])
@pytest.mark.parametrize("masked", [(), ("x",), ("x", "y")], ids=str)
def test_potentials_are_those_of_a_cpu(n, m, masked):
  x, y = points(n), points(m)
  weights = (
    mask(n) if "x" in masked else None,
    mask(m) if "y" in masked else None,
  )
  found, expected = (way.potentials(x, y, *weights) for way in (on_onnx, on_cpu))
  for own, other, valid in zip(
    found, expected, (weights[0], weights[1], weights[0]), strict=True
  ):
    valid = jnp.ones(own.shape, bool) if valid is None else valid
    np.testing.assert_allclose(own[valid], other[valid], atol=1e-5)


def test_masses_have_no_such_form():
  with pytest.raises(ValueError, match="x_weights has dtype float32"):
    on_onnx.potentials(points(4), points(4), jnp.ones((3, 4)), None)
