"""Softmax attention in one expression and in blocks, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax as softmax_of

from asap_jax import softmax_attention
from asap_jax.attention.implementations import blocks, xla_short

BATCH, HEADS, N, M, DIM = 4, 2, 5, 7, 3
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (
  jnp.asarray(RANDOM.normal(size=(BATCH, size, HEADS, DIM)), jnp.float32)
  for size in (N, M, M)
)
BIAS = jnp.asarray(RANDOM.normal(size=(HEADS, N, M)), jnp.float32)
# Of each element its own; the first query of the first may attend to nothing.
MASK = jnp.asarray(RANDOM.random((BATCH, 1, N, M)) < 0.7).at[0, 0, 0].set(False)
CASES = {
  "plain": {},
  "bias": {"bias": BIAS},
  "mask": {"mask": MASK},
  "both": {"bias": jnp.where(MASK, BIAS, jnp.nan), "mask": MASK},
}


def expected(query, key, value, bias=0.0, mask=True):
  query, key, value = (np.float64(x).swapaxes(1, 2) for x in (query, key, value))
  allowed = np.broadcast_to(mask, (BATCH, HEADS, N, M))
  scores = query @ key.swapaxes(2, 3) / DIM**0.5 + np.where(allowed, bias, 0.0)
  scores = np.where(allowed, scores, -1e30)
  weights = softmax_of(scores, axis=-1) * allowed
  return (weights @ value).swapaxes(1, 2)


# Pairs in a block: two elements of the batch, or none that fits.
@pytest.fixture(params=[None, 2 * N * M, 1], ids=["short", "blocks", "single"])
def form(request, monkeypatch):
  if request.param is not None:
    monkeypatch.setattr(xla_short, "_SHORT", 0)
    monkeypatch.setattr(blocks, "_PAIRS", request.param)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(form, name):
  options, cotangent = (
    CASES[name],
    RANDOM.normal(size=(BATCH, N, HEADS, DIM)),
  )

  @jax.jit
  def run(*inputs):
    def loss(*inputs):
      out = softmax_attention(*inputs, **options)
      return jnp.vdot(cotangent, out), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)

  inputs = QUERY, KEY, VALUE
  slopes, out = run(*inputs)
  np.testing.assert_allclose(out, expected(*inputs, **options), atol=1e-5)
  for place, slope in enumerate(slopes):
    tangent = RANDOM.normal(size=slope.shape)

    def moved(step, place=place, tangent=tangent):
      points = [np.float64(x) for x in inputs]
      points[place] += step * tangent
      return np.vdot(cotangent, expected(*points, **options))

    wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.vdot(slope, tangent), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs(form, dtype):
  inputs = [x.astype(dtype) for x in (QUERY, KEY, VALUE)]
  out = jax.jit(functools.partial(softmax_attention, mask=MASK))(*inputs)
  assert out.dtype == dtype
  np.testing.assert_allclose(np.float64(out), expected(*inputs, mask=MASK), atol=2e-2)
