"""Attention by fused calls: precision of duals, range, transformations.

JAX's own fused attention stands in for cuDNN's; see also test_implementations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import references
from helpers.fused_stand_in import fused
from scipy.special import logsumexp

from asap_jax.attention.implementations import cudnn
from asap_jax.attention.implementations import cudnn_sums as fused_calls
from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.cudnn import cudnn_attention

BATCH, HEADS, N, M, DIM = 2, 2, 96, 160, 16
RANDOM = np.random.default_rng(0)


def normal(*shape, dtype=jnp.bfloat16):
  return jnp.asarray(RANDOM.normal(size=shape), dtype)


QUERY, KEY = normal(BATCH, HEADS, N, DIM), normal(BATCH, HEADS, M, DIM)
# Values narrower and wider than the keys.
VALUES = {width: normal(BATCH, HEADS, M, width) for width in (5, 40)}
F = normal(BATCH, HEADS, N, dtype=jnp.float32)
SCALE = DIM**-0.5
attend = jax.jit(
  functools.partial(cudnn_attention, fused=fused), static_argnames=("count", "scale")
)


def logits(query):
  return SCALE * np.float64(query) @ np.float64(KEY).swapaxes(-1, -2)


def duals(query, f, dtype=jnp.bfloat16):
  """Key side's duals by one call, and whether they can be trusted."""
  run = jax.jit(functools.partial(fused_calls.transform, fused, scale=SCALE))
  sums = jnp.ones((BATCH, HEADS, N)), jnp.ones((BATCH, HEADS, M))
  return run(query.astype(dtype), KEY.astype(dtype), *sums, f)


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_duals_are_more_exact_than_the_inputs_dtype(spread):
  query, f = spread * QUERY, 3 * F
  g, exact = duals(query, f)
  assert exact
  wanted = -logsumexp(logits(query) + np.float64(f)[..., None], axis=-2)
  error = np.abs(g - wanted)
  assert error.max() < 2e-2
  assert error.mean() < 3e-3
  # What a log-sum-exp in bfloat16 would have lost.
  rounded = np.float64(jnp.asarray(wanted).astype(jnp.bfloat16))
  assert error.mean() < np.abs(rounded - wanted).mean() / 2


def test_duals_of_float16():
  g, exact = duals(QUERY, F, jnp.float16)
  assert exact
  scores = logits(QUERY.astype(jnp.float16)) + np.float64(F)[..., None]
  np.testing.assert_allclose(g, -logsumexp(scores, axis=-2), atol=2e-3)


@pytest.mark.parametrize("width", VALUES)
def test_values_of_any_width(width):
  out = attend(QUERY, KEY, VALUES[width], F, scale=SCALE)
  wanted = references.closed_values(SCALE * np.float64(QUERY), KEY, VALUES[width], F, 1)
  np.testing.assert_allclose(np.float64(out), wanted, atol=1e-2)


def test_large_duals_keep_their_small_differences():
  # In one bfloat16, g of about 1,000 would be off by up to 4; nothing else would be.
  key = KEY.at[..., 0].set(1.0)
  far = jnp.linspace(0, 1000, M)[:, None] * jnp.eye(DIM)[0]
  query, key = QUERY.at[..., 0].set(1.0), (key + far).astype(jnp.bfloat16)
  value = VALUES[5]
  out = attend(query, key, value, F, scale=SCALE)
  wanted = references.closed_values(SCALE * np.float64(query), key, value, F, 1)
  np.testing.assert_allclose(np.float64(out), wanted, atol=2e-2)


def test_negative_scale_excludes_absent_keys():
  keys = jnp.arange(M) < 7
  out = attend(QUERY, KEY, VALUES[5], F, key_weights=keys, scale=-1.0)
  wanted = references.closed_values(
    -np.float64(QUERY), *(np.float64(x)[:, :, :7] for x in (KEY, VALUES[5])), F, 1
  )
  np.testing.assert_allclose(np.float64(out), wanted, atol=2e-2)


@pytest.mark.parametrize("wide", ["logits", "duals"])
def test_what_leaves_the_range_is_done_in_chunks(wide):
  query, f = QUERY, F
  if wide == "logits":
    # One query that no point of reference comes near.
    query = query.at[..., 51, :].set(150 * KEY[..., 0, :])
  else:
    f = f.at[..., 3].set(200.0)
    # And where it matters: the others win by their logits.
    query = query.at[..., 3, :].set(-80 * KEY[..., 0, :])
  _, exact = duals(query, f)
  assert not exact
  out = attend(query, KEY, VALUES[5], f, scale=SCALE)
  wanted = references.closed_values(SCALE * np.float64(query), KEY, VALUES[5], f, 1)
  np.testing.assert_allclose(np.float64(out), wanted, atol=2e-2)


def test_what_stays_in_the_range_is_not_done_in_chunks(monkeypatch):
  def nothing(static, query, key, value, *rest):
    return jnp.full((*query.shape[:-1], value.shape[-1]), jnp.nan, value.dtype)

  monkeypatch.setattr(cudnn, "_chunked", nothing)
  fresh = jax.jit(functools.partial(cudnn_attention, fused=fused, scale=SCALE))
  # A sequence without points has no shares, and none is needed.
  present = jnp.asarray([True, False])[:, None, None]
  masks = jnp.broadcast_to(present, (BATCH, 1, N)), jnp.ones((BATCH, 1, M), bool)
  out = fresh(QUERY, KEY, VALUES[5], F, query_weights=masks[0], key_weights=masks[1])
  assert jnp.isfinite(out).all()
  np.testing.assert_array_equal(out[1], 0)


@pytest.mark.slow
def test_vmap_agrees_with_a_loop_also_where_one_side_is_shared():
  key, value = KEY[0, 0], VALUES[5][0, 0]
  queries, f = jnp.moveaxis(QUERY[:, 0], 0, 1), F[:, 0]  # mapped along the second axis
  mask = jnp.arange(M) < 100

  @functools.partial(jax.value_and_grad, has_aux=True)
  def slope(query, f):
    out = cudnn_attention(query, key, value, f, 1, None, mask, scale=SCALE, fused=fused)
    return out.astype(jnp.float32).sum(), out

  mapped = jax.jit(jax.vmap(slope, in_axes=(1, 0)))(queries, f)
  one = jax.jit(slope)
  for index in range(BATCH):
    (_, out), gradient = one(queries[:, index], f[index])
    (_, outs), gradients = jax.tree.map(lambda x, i=index: x[i], mapped)
    np.testing.assert_allclose(*(np.float64(x) for x in (outs, out)), atol=1e-2)
    both = (np.float64(x) for x in (gradients, gradient))
    np.testing.assert_allclose(*both, atol=1e-2 * np.abs(np.float64(gradient)).max())


@pytest.mark.slow
def test_jit_agrees_with_eager_and_weights_with_the_chunked_form():
  weights = jnp.abs(F[0, 0]).at[2].set(0.0), None
  arguments = QUERY, KEY, VALUES[5], F, 1, *weights
  eager = cudnn_attention(*arguments, scale=SCALE, fused=fused)
  np.testing.assert_allclose(
    *(np.float64(x) for x in (eager, attend(*arguments, scale=SCALE))), atol=1e-2
  )
  wide = SCALE * QUERY.astype(jnp.float32), KEY.astype(jnp.float32)
  wanted = chunked_attention(*wide, *arguments[2:])
  np.testing.assert_allclose(*(np.float64(x) for x in (eager, wanted)), atol=2e-2)


@pytest.mark.usefixtures("unchecked")
def test_what_the_kernel_does_not_take_is_refused():
  arguments = QUERY, KEY, VALUES[5], F
  with pytest.raises(ValueError, match=r"bfloat16, float32.*the same for all three"):
    cudnn_attention(QUERY.astype(jnp.float32), *arguments[1:])
  with pytest.raises(ValueError, match=r"bias: .*expected None"):
    cudnn_attention(*arguments, bias=jnp.zeros((N, M)))
  with pytest.raises(ValueError, match=r"scale=0\.0: .*not zero"):
    cudnn_attention(*arguments, scale=0.0)
  with pytest.raises(ValueError, match=r"scale=.*bind it outside of jit"):
    jax.jit(lambda s: cudnn_attention(*arguments, scale=s))(1.0)
  with pytest.raises(ValueError, match="count=0"):
    cudnn_attention(*arguments, 0)
  with pytest.raises(ValueError, match="momentum has shape"):
    cudnn_attention(*arguments, 2, momentum=jnp.ones((HEADS, 2)))
  with pytest.raises(ValueError, match="side='keys'"):
    cudnn_attention(*arguments, side="keys")


@pytest.mark.parametrize("spread", [1.0, 3e4])
def test_half_a_closure_whatever_the_range_of_its_dual(spread):
  query, key, value = (x.astype(jnp.float16) for x in (QUERY, KEY, VALUES[5]))
  g = spread * normal(BATCH, HEADS, M, dtype=jnp.float32)
  half = functools.partial(cudnn_attention, scale=SCALE, side="key", fused=fused)
  out = jax.jit(lambda *a: half(*a, 0))(query, key, value, g)
  scores = SCALE * np.float64(query) @ np.float64(key).swapaxes(-1, -2)
  scores = scores + np.float64(g)[..., None, :]
  weights = np.exp(scores - logsumexp(scores, axis=-1, keepdims=True))
  np.testing.assert_allclose(np.float64(out), weights @ np.float64(value), atol=2e-2)
