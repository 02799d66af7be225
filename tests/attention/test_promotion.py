"""Who forbids the promotion of ranks or dtypes is not told of this package's own."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax
from asap_jax import DualMap, asap_attention, sinkhorn_attention

BATCH, N, HEADS, DIM = 3, 5, 2, 4
TOKENS = jax.random.normal(jax.random.key(0), (BATCH, N, HEADS, DIM))
VALID = jnp.arange(N) < jnp.array([[5], [3], [1]])
MASK = nnx.make_attention_mask(VALID, VALID)
DUAL_MAP = DualMap(
  jax.random.normal(jax.random.key(1), (HEADS, 2, DIM)),
  jnp.full((HEADS, 2 + DIM + 2), 0.1),
)
sinkhorn = functools.partial(sinkhorn_attention, iterations=2)
FUNCTIONS = {
  "softmax": asap_jax.softmax_attention,
  "zero": sinkhorn,
  "gaussian": functools.partial(sinkhorn, start="gaussian"),
  "full": functools.partial(sinkhorn, start="gaussian_full"),
  "half": functools.partial(sinkhorn, start="gaussian", iterations=0),
  "relaxed": functools.partial(sinkhorn, relaxation=1.5),
  "tolerance": functools.partial(sinkhorn, tolerance=0.1),
  "chunked": functools.partial(sinkhorn, implementation="chunked"),
  "ott": functools.partial(sinkhorn, implementation="ott"),
  "sliced": functools.partial(asap_attention, dual_map=DUAL_MAP),
}


@contextlib.contextmanager
def nothing_promoted():
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    yield


def test_it_is_forbidden_here():
  with nothing_promoted(), pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones(3)
  with nothing_promoted(), pytest.raises(ValueError, match="promotion"):
    jnp.ones(3) + jnp.ones(3, bool)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_values_and_slopes_under_it(name, masked):
  mask = MASK if masked else None

  def loss(tokens):
    return (FUNCTIONS[name](tokens, tokens, tokens, mask=mask) ** 2).sum()

  step = jax.value_and_grad(loss)
  expected = jax.jit(step)(TOKENS)
  with nothing_promoted():
    found = jax.jit(step)(TOKENS)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
