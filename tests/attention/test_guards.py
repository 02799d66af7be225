"""Under the guards of JAX that look for NaN, leaked tracers and silent transfers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax

SINKHORN = functools.partial(asap_jax.sinkhorn_attention, iterations=2)
DUAL_MAP = asap_jax.DualMap(
  jax.random.normal(jax.random.key(0), (2, 2, 4)),
  0.1 * jnp.ones((2, 6)),
  ("potentials", "query"),
)
FUNCTIONS = {
  "softmax": asap_jax.softmax_attention,
  "zero": SINKHORN,
  "ott": functools.partial(SINKHORN, implementation="ott"),
  "chunked": functools.partial(SINKHORN, implementation="chunked"),
  "gaussian": functools.partial(SINKHORN, start="gaussian"),
  "packed": functools.partial(SINKHORN, max_segments=2),
  "compiled": functools.partial(asap_jax.asap_attention, dual_map=DUAL_MAP),
}


def arguments():
  tokens = jax.random.normal(jax.random.key(1), (3, 3, 6, 2, 4))
  valid = jnp.arange(6) < jnp.array([6, 3, 0])[:, None]
  return (*tokens, nnx.make_attention_mask(valid, valid, dtype=bool))


def with_slopes(function):
  def loss(query, key, value, mask):
    return jnp.sum(function(query, key, value, mask=mask) ** 2)

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      n, marks=[pytest.mark.slow] * (n in ("gaussian", "chunked", "ott", "compiled"))
    )
    for n in FUNCTIONS
  ],
)
def test_no_nan_is_made_nothing_leaks_and_nothing_is_transferred(name):
  given = arguments()
  step = with_slopes(FUNCTIONS[name])
  with jax.debug_nans(True), jax.checking_leaks():
    expected = jax.jit(step)(*given)
    jax.block_until_ready(expected)
  run = jax.jit(step)
  with jax.transfer_guard("disallow"):
    found = run(*given)
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", ["zero", "compiled"])
def test_padding_makes_no_nan_eagerly(name):
  with jax.debug_nans(True):
    assert np.isfinite(FUNCTIONS[name](*arguments()[:3], mask=arguments()[3])).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_without_elements(name):
  query, key, value, mask = (x[:0] for x in arguments())
  loss, slopes = with_slopes(FUNCTIONS[name])(query, key, value, mask)
  assert loss == 0.0
  assert [slope.shape for slope in slopes] == [(0, 6, 2, 4)] * 3
