"""What one sequence holds, or what lies at padding, changes nothing elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asap_jax import DualMap, asap_attention, sinkhorn_attention, softmax_attention

BATCH, N, HEADS, DIM = 3, 6, 2, 4
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


TOKENS = tuple(2 * normal(BATCH, N, HEADS, DIM) for _ in range(3))
BIAS = normal(BATCH, HEADS, N, N)
WEIGHTS = normal(BATCH, N, HEADS, DIM)
VALID = jnp.arange(N) < jnp.asarray([[N], [4], [5]])
MASK = nnx.make_attention_mask(VALID, VALID)
OTHERS = np.array([0, 2])
SLICED = DualMap(normal(HEADS, 2, DIM), 0.3 * normal(HEADS, 2 + DIM + 2))
LINEAR = DualMap(
  normal(HEADS, 1, DIM), 0.3 * normal(HEADS, DIM), features=("query",)
).with_closures(3)

ATTENTION = {
  "softmax": softmax_attention,
  **{
    f"sinkhorn@{count} {name}": functools.partial(
      sinkhorn_attention, iterations=count, implementation=name
    )
    for name, count in (("ott", 3), ("xla", 1), ("xla", 3), ("chunked", 3))
  },
  "gaussian": functools.partial(sinkhorn_attention, iterations=1, start="gaussian"),
  **{
    f"asap {kind} {name}": functools.partial(
      asap_attention, dual_map=dual_map, implementation=name
    )
    for name in ("xla", "chunked")
    for kind, dual_map in (("sliced", SLICED), ("linear", LINEAR))
  },
}
everyone = pytest.mark.parametrize("attend", ATTENTION.values(), ids=ATTENTION)


@functools.partial(jax.jit, static_argnums=0)
def run(attend, tokens, bias, mask):
  """Outputs, and the gradient of a weighted sum of them."""

  def loss(tokens, bias):
    out = attend(*tokens, bias=bias, mask=mask)
    # A sequence that is NaN takes no part.
    return jnp.where(jnp.isnan(out), 0.0, out * WEIGHTS).sum(), out

  slopes, out = jax.grad(loss, (0, 1), has_aux=True)(tokens, bias)
  return out, slopes


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
@everyone
def test_nan_in_one_sequence_leaves_the_others_as_they_are(attend, mask):
  expected = run(attend, TOKENS, BIAS, mask)
  spoilt = [tokens.at[1, 2].set(jnp.nan) for tokens in TOKENS]
  cases = [(*TOKENS[:i], spoilt[i], *TOKENS[i + 1 :]) for i in range(3)]
  given = [(tokens, BIAS) for tokens in cases]
  given.append((TOKENS, BIAS.at[1, :, 2, 3].set(jnp.nan)))
  for tokens, bias in given:
    actual = run(attend, tokens, bias, mask)
    assert jnp.isnan(actual[0][1]).any()
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
      np.testing.assert_allclose(one[OTHERS], other[OTHERS], atol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
@everyone
def test_what_lies_at_padding_changes_nothing(attend, value):
  expected = run(attend, TOKENS, BIAS, MASK)
  padding = ~VALID[:, :, None, None]
  tokens = tuple(jnp.where(padding, value, x) for x in TOKENS)
  bias = jnp.where(MASK, BIAS, value)
  actual = run(attend, tokens, bias, MASK)
  for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
