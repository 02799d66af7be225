"""Attention in chunks: bias, memory, transformations; see also test_implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import references

from asap_jax.attention.implementations import chunked
from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.xla import scaled_attention

BATCH, HEADS, N, M, DIM, VALUES = 2, 2, 7, 9, 4, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY, KEY = normal(BATCH, HEADS, N, DIM), normal(BATCH, HEADS, M, DIM)
VALUE, F = normal(BATCH, HEADS, M, VALUES), normal(BATCH, HEADS, N)
G = normal(BATCH, HEADS, M)
QUERY_MASK = (jnp.arange(N) < jnp.asarray([5, 7])[:, None])[:, None]
KEY_MASK = (jnp.arange(M) < jnp.asarray([9, 6])[:, None])[:, None]


@pytest.fixture
def small(monkeypatch):
  """One head at a time, in chunks of two."""
  monkeypatch.setattr(chunked, "_CPU_BUDGET", 1)
  monkeypatch.setattr(chunked, "_LEAST_CHUNK", 2)


@pytest.fixture
def pairs(monkeypatch):
  """One sequence at a time with both of its heads, in chunks of two."""
  monkeypatch.setattr(chunked, "_CPU_BUDGET", HEADS * 2 * M)
  monkeypatch.setattr(chunked, "_LEAST_CHUNK", 2)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
  "shape", [(BATCH, HEADS, N, M), (HEADS, 1, M), (BATCH, 1, N, 1)]
)
def test_bias_of_any_shape_against_float64(shape):
  bias = 2 * normal(*shape)
  # What it holds between absent points is nobody's business.
  if shape == (BATCH, HEADS, N, M):
    present = QUERY_MASK[..., :, None] & KEY_MASK[..., None, :]
    bias = jnp.where(present, bias, jnp.nan)
  cotangent, tangent = normal(BATCH, HEADS, N, VALUES), normal(*shape)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
  def slopes(query, bias):
    out = chunked_attention(query, KEY, VALUE, F, 1, QUERY_MASK, KEY_MASK, bias=bias)
    return jnp.vdot(cotangent, out), out

  def expected(step):
    full = np.nan_to_num(np.float64(bias)) + step * np.float64(tangent)
    full = np.broadcast_to(full, (BATCH, HEADS, N, M))
    return references.closed_values(
      QUERY, KEY, VALUE, F, 1, QUERY_MASK, KEY_MASK, bias=full
    )

  (slope, bias_slope), out = slopes(QUERY, bias)
  np.testing.assert_allclose(out, expected(0.0), atol=2e-5)
  assert jnp.isfinite(slope).all()
  wanted = np.vdot(cotangent, expected(1e-5) - expected(-1e-5)) / 2e-5
  np.testing.assert_allclose(np.vdot(bias_slope, tangent), wanted, atol=1e-4)


@pytest.mark.usefixtures("pairs")
def test_bias_per_head_of_sequences_in_turn():
  bias = normal(1, HEADS, N, M)
  actual = jax.jit(chunked_attention)(QUERY, KEY, VALUE, F, bias=bias)
  full = jnp.broadcast_to(bias, (BATCH, HEADS, N, M))
  wanted = references.closed_values(QUERY, KEY, VALUE, F, 1, bias=full)
  np.testing.assert_allclose(actual, wanted, atol=2e-5)


@pytest.mark.parametrize(
  ("side", "count"), [("query", 3), ("key", 3), ("key", 0)], ids=str
)
@pytest.mark.usefixtures("small")
def test_sharp_logits_against_float64(side, count):
  query, dual = 60 * QUERY, 40 * (F if side == "query" else G)
  options = {"side": side}
  if count:
    factors = jnp.asarray([[1.2, 0.9], [1.0, 1.4]])
    options |= {"relaxation": factors, "momentum": factors - 1.1}
  attend = jax.jit(lambda *a: chunked_attention(*a, count, **options))
  wanted = references.closed_values(query, KEY, VALUE, dual, count, **options)
  np.testing.assert_allclose(attend(query, KEY, VALUE, dual), wanted, atol=1e-3)


def test_float_weights_against_the_kernel_that_is_formed():
  weights = jnp.abs(normal(N)).at[2].set(0.0), jnp.abs(normal(M)).at[5].set(0.0)
  attend = [
    jax.jit(lambda a, b, f=f: f(QUERY, KEY, VALUE, F, 2, a, b))
    for f in (chunked_attention, scaled_attention)
  ]
  actual, wanted = (f(*weights) for f in attend)
  np.testing.assert_allclose(actual, wanted, atol=2e-5)
  assert np.abs(wanted[:, :, 2]).max() == 0 < np.abs(wanted).max()


@pytest.mark.parametrize("absent", ["queries", "keys"])
def test_a_sequence_without_points_is_zero(absent):
  nobody = jnp.asarray([[True], [False]])
  masks = {"queries": (QUERY_MASK & nobody[..., None], KEY_MASK)}
  masks["keys"] = QUERY_MASK, KEY_MASK & nobody[..., None]

  def total(*inputs):
    out = chunked_attention(*inputs, 2, *masks[absent])
    return out.sum(), out

  slopes, out = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(
    QUERY, KEY, VALUE, F
  )
  np.testing.assert_array_equal(out[1], 0)
  assert np.abs(out[0]).max() > 0
  for slope in slopes:
    assert jnp.isfinite(slope).all()
    np.testing.assert_array_equal(slope[1], 0)


@pytest.mark.usefixtures("small")
def test_vmap_agrees_with_a_loop():
  # The keys are shared.
  def attend(query, f):
    return chunked_attention(query, KEY[0, 0], VALUE[0, 0], f)

  queries, duals = QUERY[:, 0], F[:, 0]
  mapped = jax.jit(jax.vmap(attend))(queries, duals)
  for query, f, out in zip(queries, duals, mapped, strict=True):
    np.testing.assert_allclose(out, attend(query, f), atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="count=0"):
    chunked_attention(QUERY, KEY, VALUE, F, 0)
  with pytest.raises(ValueError, match="relaxation has shape"):
    chunked_attention(QUERY, KEY, VALUE, F, 2, relaxation=jnp.ones((HEADS, 2)))
  with pytest.raises(ValueError, match="momentum has shape"):
    chunked_attention(QUERY, KEY, VALUE, F, 2, momentum=jnp.ones((HEADS, 2)))
  with pytest.raises(ValueError, match="side='keys'"):
    chunked_attention(QUERY, KEY, VALUE, F, side="keys")
  with pytest.raises(ValueError, match="key_weights has shape"):
    chunked_attention(QUERY, KEY, VALUE, F, 1, None, QUERY_MASK)


def temporaries(function, length, count):
  """Bytes that XLA sets aside for one head, nothing of which is run."""
  shapes = [(1, 1, length, 16)] * 3 + [(1, 1, length)]
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = jax.jit(lambda *a: function(*a, count)).lower(*inputs).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def backward(query, key, value, f, count):
  def loss(*inputs):
    return chunked_attention(*inputs, count).sum()

  return jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, f)


@pytest.mark.parametrize(("function", "count"), [(chunked_attention, 1), (backward, 3)])
def test_memory_grows_with_the_length_and_not_its_square(function, count):
  length = 2**14
  used = temporaries(function, length, count)
  # What is linear in the length, and a few chunks of scores.
  chunk = 4 * length * chunked._LEAST_CHUNK
  assert used < 20 * (4 * length * 16) + 4 * chunk
  assert used < 4 * length**2 / 16


def test_memory_of_the_kernel_that_is_formed_is_above_that_bound():
  length = 2**14
  assert temporaries(scaled_attention, length, 1) > 4 * length**2
