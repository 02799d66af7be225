import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.peer_cases import sown_weights

from asap_jax.peers import cayley_attention, qr_attention

FUNCTIONS = pytest.mark.parametrize("function", [qr_attention, cayley_attention])
QUERY, KEY, VALUE = 3.0 * jax.random.normal(jax.random.key(0), (3, 2, 9, 2, 4))


@FUNCTIONS
def test_rows_and_columns_are_exact_at_once(function):
  valid = jnp.arange(9) < jnp.array([[9], [5]])
  mask = nnx.make_attention_mask(valid, valid)
  plan = sown_weights(function, QUERY, KEY, VALUE, mask=mask)
  expected = jnp.broadcast_to(valid[:, None], plan.shape[:-1])
  for axis in (-1, -2):
    np.testing.assert_allclose(plan.sum(axis), expected, atol=1e-5)
  assert (plan >= 0).all()


@FUNCTIONS
def test_padding_is_isolated_exactly(function):
  expected = function(QUERY[:, :6], KEY[:, :6], VALUE[:, :6])
  valid = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
  mask = nnx.make_attention_mask(valid, valid)
  found = function(QUERY, KEY, VALUE, mask=mask)
  np.testing.assert_allclose(found[:, :6], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found[:, 6:], 0.0)


def test_cayley_of_tokens_in_another_order_is_in_that_order():
  order = np.random.default_rng(0).permutation(9)
  moved = (x[:, order] for x in (QUERY, KEY, VALUE))
  expected = cayley_attention(QUERY, KEY, VALUE)[:, order]
  np.testing.assert_allclose(cayley_attention(*moved), expected, rtol=1e-4, atol=1e-5)


def test_cayley_of_symmetric_logits_is_the_identity():
  found = cayley_attention(QUERY, QUERY, VALUE)
  np.testing.assert_allclose(found, VALUE, rtol=1e-4, atol=1e-5)


@FUNCTIONS
def test_what_has_no_square_is_refused(function):
  with pytest.raises(ValueError, match="query has 9 tokens, key 8"):
    function(QUERY, KEY[:, :8], VALUE[:, :8])
  rows = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
  mask = nnx.make_attention_mask(rows, jnp.ones_like(rows))
  assert jnp.isnan(function(QUERY, KEY, VALUE, mask=mask)[:, :6]).all()


@pytest.mark.parametrize("derivative", ["forward", "reverse"])
def test_the_derivative_of_cayley_solves_no_system_of_its_own(derivative):
  # Batched triangular systems side by side can hang a CPU with two threads.
  tokens = jax.random.normal(jax.random.key(0), (4, 6, 2, 3))

  def value(x):
    return (cayley_attention(x, 2.0 * x + 1.0, x) ** 2).sum()

  derived = {
    "forward": lambda x: jax.jvp(value, (x,), (x,))[1],
    "reverse": jax.grad(value),
  }[derivative]
  systems = [
    str(jax.make_jaxpr(f)(tokens)).count("triangular_solve") for f in (value, derived)
  ]
  assert 0 < systems[1] <= systems[0]
