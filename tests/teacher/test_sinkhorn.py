import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import (
  KEY_MASK,
  QUERY_MASK,
  WEIGHTS,
  M,
  N,
  on_device,
  presence,
  random_logits,
)
from helpers.pages import ROOT

from asap_jax.c_transform.entropic import closure, plan
from asap_jax.teacher.sinkhorn import sinkhorn_duals, sinkhorn_source_dual

solve = jax.jit(sinkhorn_duals, static_argnums=1)
source = jax.jit(sinkhorn_source_dual, static_argnums=1)


def assert_duals(actual, expected, atol=2e-5):
  for ours, theirs in zip(actual, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("iterations", [1, 2, 5, 7, 10, 20, 25])
def test_any_number_of_iterations_against_float64(iterations):
  # Logits this sharp are far from convergence: one iteration more or less shows.
  logits = random_logits(scale=8.0)[0]
  weights = WEIGHTS["masks"]
  expected = oracles.closures(logits, np.zeros(N), iterations, *weights)
  one_more = oracles.closures(logits, expected[0], 1, *weights)
  assert np.abs(one_more[0] - expected[0]).max() > 1e-2
  assert_duals(solve(logits, iterations, *on_device(weights)), expected, atol=1e-4)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_against_float64(weights):
  logits = random_logits(1)[0]
  expected = oracles.closures(logits, np.zeros(N), 3, *weights)
  assert_duals(solve(logits, 3, *on_device(weights)), expected)


@pytest.mark.parametrize("hole", [0.0, np.nan, -np.inf])
def test_starting_dual(hole):
  logits, weights = random_logits(2)[0], WEIGHTS["masks"]
  init = np.random.default_rng(3).normal(size=N).astype(np.float32)
  expected = oracles.closures(logits, init, 2, *weights)
  holed = jnp.asarray(np.where(QUERY_MASK, init, hole), jnp.float32)
  assert_duals(solve(logits, 2, *on_device(weights), holed), expected)


@pytest.mark.parametrize("iterations", [1, 2, 7])
@pytest.mark.parametrize("key", ["masks", "mask and masses"])
def test_closing_the_source_dual_gives_back_the_plan(iterations, key):
  logits, weights = random_logits(scale=8.0)[0], WEIGHTS[key]
  f = source(logits, iterations, *on_device(weights))
  before = oracles.closures(logits, np.zeros(N), iterations - 1, *weights)
  np.testing.assert_allclose(f, before[0], atol=1e-4)
  expected = oracles.closures(logits, np.zeros(N), iterations, *weights)
  duals = closure(logits, f, *on_device(weights))
  weighed = plan(logits, duals, *on_device(weights))
  expected = oracles.plan(logits, *expected, *weights)
  np.testing.assert_allclose(weighed, expected, atol=1e-4)


@pytest.mark.parametrize("key", ["equal", "masks", "masses with zeros"])
def test_gradients_against_finite_differences(key):
  weights = WEIGHTS[key]
  logits = random_logits(4, scale=1.0)[0]
  rng = np.random.default_rng(5)
  u, v = rng.normal(size=N), rng.normal(size=M)

  def oracle(logits):
    f, g = oracles.closures(logits, np.zeros(N), 3, *weights)
    return u @ f + v @ g

  @jax.jit
  @jax.grad
  def slope(logits):
    f, g = sinkhorn_duals(logits, 3, *on_device(weights))
    return jnp.vdot(u, f) + jnp.vdot(v, g)

  expected = oracles.gradient(oracle, logits)
  absent = ~presence(weights)
  holes = (0.0, np.nan, np.inf) if absent.any() else (0.0,)
  for hole in holes:
    actual = slope(jnp.where(absent, hole, logits))
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    np.testing.assert_array_equal(actual[absent], 0)


@pytest.mark.parametrize("side", ["query", "key", "both"])
def test_no_points_give_zeros_and_finite_gradients(side):
  masks = tuple(
    jnp.full(size, side not in (name, "both"))
    for name, size in (("query", N), ("key", M))
  )

  @jax.jit
  @jax.value_and_grad
  def loss(logits):
    duals = sinkhorn_duals(logits, 2, *masks)
    return jnp.sum(plan(logits, duals, *masks))

  value, slope = loss(random_logits()[0])
  assert value == 0
  np.testing.assert_array_equal(slope, 0)
  duals = solve(random_logits()[0], 2, *masks)
  for dual, mask in zip(duals, masks, strict=True):
    assert jnp.isfinite(dual).all()
    np.testing.assert_array_equal(dual[~mask], 0)


def test_batches_and_vmap_agree_with_float64():
  # Heads share a mask; every sequence has its own.
  logits = jnp.stack([random_logits(s)[0] for s in range(4)]).reshape(2, 2, N, M)
  masks = jnp.stack([QUERY_MASK, ~QUERY_MASK])[:, None]
  key_mask = jnp.asarray(KEY_MASK)
  batched = solve(logits, 3, masks, key_mask)
  mapped = jax.vmap(lambda s, mask: sinkhorn_duals(s, 3, mask, key_mask))
  mapped = jax.jit(mapped)(logits, masks)
  for b, h in np.ndindex(2, 2):
    mask = np.asarray(masks[b, 0])
    expected = oracles.closures(logits[b, h], np.zeros(N), 3, mask, KEY_MASK)
    assert_duals((batched.f[b, h], batched.g[b, h]), expected)
    assert_duals((mapped.f[b, h], mapped.g[b, h]), expected)


def test_half_precision_logits_give_float32_duals():
  logits = random_logits()[0].astype(jnp.bfloat16)
  duals = solve(logits, 3)
  assert duals.f.dtype == duals.g.dtype == jnp.float32
  expected = oracles.closures(logits.astype(jnp.float32), np.zeros(N), 3)
  assert_duals(duals, expected)
  for iterations in (1, 3):
    assert source(logits, iterations).dtype == jnp.float32


def test_logits_of_hundreds():
  signs = np.where(np.random.default_rng(0).normal(size=(N, M)) > 0, 1.0, -1.0)
  logits = jnp.asarray(500 * signs + random_logits()[0], jnp.float32)
  expected = oracles.closures(logits, np.zeros(N), 3, *WEIGHTS["masks"])
  assert_duals(solve(logits, 3, *on_device(WEIGHTS["masks"])), expected, atol=2e-3)


@pytest.mark.parametrize("function", [sinkhorn_duals, sinkhorn_source_dual])
def test_arguments_that_do_not_fit_are_refused(function):
  with pytest.raises(ValueError, match="iterations=0"):
    function(random_logits()[0], 0)
  for iterations in (1, 2):
    with pytest.raises(ValueError, match="query_weights has shape"):
      function(random_logits()[0], iterations, jnp.ones(M, bool))
    with pytest.raises(ValueError, match="key_weights has shape"):
      function(random_logits()[0], iterations, None, jnp.ones(N))


def test_the_package_serves_compiled_models_without_ott():
  code = """
import sys
blocked = ("ott", "jaxopt", "lineax")
sys.modules.update(dict.fromkeys(blocked))  # None: their import fails
import jax.numpy as jnp
import asap_jax
logits = jnp.zeros((3, 4))
assert asap_jax.teacher.sinkhorn_source_dual(logits, 2).shape == (3,)
assert asap_jax.c_transform.scaled_plan(logits, jnp.zeros(3), 2).dense().shape == (3, 4)
try:
  asap_jax.sinkhorn_duals(logits, 2)
except ImportError as error:
  assert "ott" in str(error)
else:
  raise AssertionError("OTT was not blocked")
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
