"""What must not matter: gauges, order, padding, batching, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import (
  KEY_MASK,
  QUERY_MASK,
  STEPS,
  WEIGHTS,
  M,
  N,
  on_device,
  presence,
  random_dual,
  random_logits,
  steps_on_device,
)

from asap_jax.c_transform.entropic import Duals, closure, closures, plan

close = jax.jit(closure)
close_often = jax.jit(closures, static_argnums=2)
weigh = jax.jit(plan)


def assert_duals(actual, expected, atol=1e-5):
  for ours, theirs in zip(actual, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("shift", [-7.0, 100.0])
def test_a_constant_in_f_changes_no_plan(shift):
  logits, f = random_logits()
  given = on_device(WEIGHTS["masks"])
  expected = weigh(logits, close(logits, f, *given), *given)
  moved = close(logits, f + shift, *given)
  np.testing.assert_allclose(weigh(logits, moved, *given), expected, atol=1e-5)


def test_permuting_the_points_permutes_the_plan():
  logits, f = random_logits()
  query_weights, key_weights = WEIGHTS["masses with zeros"]
  rng = np.random.default_rng(0)
  p, q = rng.permutation(N), rng.permutation(M)
  given = on_device((query_weights, key_weights))
  moved = on_device((query_weights[p], key_weights[q]))
  expected = weigh(logits, close(logits, f, *given), *given)[p][:, q]
  permuted = logits[p][:, q]
  actual = weigh(permuted, close(permuted, f[p], *moved), *moved)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, 1e4])
def test_padding_reaches_neither_duals_nor_plan(hole):
  logits, f = random_logits()
  expected = oracles.closures(logits, f, 1, QUERY_MASK, KEY_MASK)
  given = on_device((QUERY_MASK, KEY_MASK))
  present = presence((QUERY_MASK, KEY_MASK))
  holed = jnp.where(present, logits, hole)
  duals = close(holed, jnp.where(QUERY_MASK, f, hole), *given)
  assert_duals(duals, expected)
  # Nor do the duals that somebody else left at absent points.
  duals = Duals(
    jnp.where(QUERY_MASK, duals.f, hole), jnp.where(KEY_MASK, duals.g, hole)
  )
  expected = oracles.plan(logits, *expected, QUERY_MASK, KEY_MASK)
  np.testing.assert_allclose(weigh(holed, duals, *given), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["momentum", "half", "key and momentum"])
def test_padding_of_any_start_reaches_neither_duals_nor_gradients(case):
  count, options = STEPS[case]
  logits, dual = random_logits()[0], random_dual(options)
  given = on_device((QUERY_MASK, KEY_MASK))
  mask = given[options.get("side") == "key"]
  expected = oracles.closures(logits, dual, count, QUERY_MASK, KEY_MASK, **options)
  own = steps_on_device(options)
  side = own.pop("side", "query")

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def slopes(point):
    logits, dual, factors = point
    duals = closures(logits, dual, count, *given, **factors, side=side)
    return duals.f.sum() + jnp.sin(duals.g).sum(), duals

  holed = jnp.where(presence((QUERY_MASK, KEY_MASK)), logits, jnp.nan)
  slope, duals = slopes((holed, jnp.where(mask, dual, jnp.nan), own))
  assert_duals(duals, expected)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
  np.testing.assert_array_equal(slope[1][~mask], 0)


@pytest.mark.parametrize("side", ["query", "key", "both"])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_no_points_give_a_null_plan_and_finite_gradients(side, dtype):
  given = tuple(
    jnp.full(size, side not in (name, "both"), dtype)
    for name, size in (("query", N), ("key", M))
  )

  @jax.jit
  @jax.value_and_grad
  def loss(logits, f):
    weighed = plan(logits, closure(logits, f, *given), *given)
    return jnp.sum(weighed + weighed**2)

  value, slope = loss(*random_logits())
  assert value == 0
  np.testing.assert_array_equal(slope, 0)
  duals = close(*random_logits(), *given)
  for dual, weight in zip(duals, given, strict=True):
    assert jnp.isfinite(dual).all()
    np.testing.assert_array_equal(dual[weight == 0], 0)


def test_logits_of_hundreds():
  signs = np.where(np.random.default_rng(0).normal(size=(N, M)) > 0, 1.0, -1.0)
  logits = jnp.asarray(500 * signs + random_logits()[0], jnp.float32)
  given = on_device(WEIGHTS["masks"])
  duals = close(logits, jnp.zeros(N), *given)
  expected = oracles.closures(logits, np.zeros(N), 1, *WEIGHTS["masks"])
  assert_duals(duals, expected, atol=1e-3)
  expected = oracles.plan(logits, *expected, *WEIGHTS["masks"])
  np.testing.assert_allclose(weigh(logits, duals, *given), expected, atol=1e-3)


def test_half_precision_logits_give_float32_duals():
  logits, f = (a.astype(jnp.bfloat16) for a in random_logits())
  duals = close(logits, f)
  weighed = weigh(logits, duals)
  assert {a.dtype for a in (*duals, weighed)} == {jnp.dtype(jnp.float32)}
  # The logits are rounded, the arithmetic on them is not.
  rounded = logits.astype(jnp.float32), f.astype(jnp.float32)
  expected = oracles.closures(*rounded, 1)
  assert_duals(duals, expected)
  np.testing.assert_allclose(weighed, oracles.plan(rounded[0], *expected), atol=1e-5)
  several = close_often(logits, f, 3)
  assert several.f.dtype == several.g.dtype == jnp.float32
  assert_duals(several, oracles.closures(*rounded, 3))


def test_batches_and_vmap_agree_with_a_loop():
  pairs = zip(random_logits(0), random_logits(1), strict=True)
  logits, f = (jnp.stack(pair) for pair in pairs)
  masks = jnp.stack([QUERY_MASK, ~QUERY_MASK])
  key_mask = jnp.asarray(KEY_MASK)

  def both(logits, f, mask, key_mask):
    duals = closure(logits, f, mask, key_mask)
    return *duals, plan(logits, duals, mask, key_mask)

  once = jax.jit(both)
  rows = [once(*row, key_mask) for row in zip(logits, f, masks, strict=True)]
  loop = [jnp.stack(parts) for parts in zip(*rows, strict=True)]
  mapped = jax.jit(jax.vmap(both, in_axes=(0, 0, 0, None)))
  for other in (mapped(logits, f, masks, key_mask), once(logits, f, masks, key_mask)):
    for ours, theirs in zip(loop, other, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_one_dual_and_one_mask_serve_a_batch():
  logits = jnp.stack([random_logits(0)[0], random_logits(1)[0]])
  f, given = random_logits()[1], on_device(WEIGHTS["masks"])
  duals = close_often(logits, f, 2, *given)
  for batch in range(2):
    expected = oracles.closures(logits[batch], f, 2, *WEIGHTS["masks"])
    assert_duals((duals.f[batch], duals.g[batch]), expected)


def test_jit_agrees_with_eager():
  logits, f = random_logits()
  given = on_device(WEIGHTS["mask and masses"])
  duals = closure(logits, f, *given)
  assert_duals(close(logits, f, *given), duals, atol=1e-6)
  eager = plan(logits, duals, *given)
  np.testing.assert_allclose(weigh(logits, duals, *given), eager, atol=1e-6)
