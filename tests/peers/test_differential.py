"""Differential attention against two softmax attentions of Flax, and its constants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import peer_references as papers
from helpers.peer_cases import (
  BATCH,
  CASES,
  DIM,
  HEADS,
  KEY,
  PARAMETERS,
  QUERY,
  VALUE,
  M,
  N,
  normal,
  sown_weights,
)

from asap_jax.peers import DifferentialParameters, differential_attention, lambda_init
from asap_jax.peers.differential import differential_lambda

BIAS = normal(BATCH, HEADS, N, M)
MASK = jnp.asarray(np.random.default_rng(2).random((BATCH, 1, N, M)) < 0.5)
MASK = MASK.at[1, 0, 3].set(False).at[:, :, 0].set(True)
half = jax.jit(
  functools.partial(
    differential_attention, parameters=PARAMETERS, initial=0.4, normalise=False
  ),
  static_argnames="is_causal",
)


@pytest.mark.parametrize("case", ["bias and mask", "causal"])
def test_difference_of_two_attentions_of_flax(case):
  given = {"bias": BIAS, "mask": MASK.at[1, 0, 3].set(True)}
  inputs = QUERY, KEY, jnp.concatenate([VALUE] * 2, axis=-1)[..., :DIM]
  parameters = PARAMETERS._replace(gain=jnp.ones(DIM))
  if case == "causal":
    given = {"is_causal": True}
    inputs = tuple(x[:, :N] for x in inputs)

  def flax(part):
    # Flax wants values as wide as keys: in two halves.
    query, key = (x[..., part] for x in inputs[:2])
    values = inputs[2][..., :2], inputs[2][..., 2:]
    outs = [nnx.dot_product_attention(query, key, v, **given) for v in values]
    return jnp.concatenate(outs, axis=-1)

  lam = differential_lambda(parameters, 0.4)
  expected = flax(slice(0, 2)) - lam * flax(slice(2, 4))
  actual = half(*inputs, parameters=parameters, **given)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_rows_sum_to_one_minus_lambda_and_columns_to_anything():
  function = functools.partial(
    differential_attention, parameters=PARAMETERS, initial=0.9
  )
  weights = sown_weights(function, QUERY, KEY, VALUE)
  lam = np.exp(np.vdot(*PARAMETERS[:2])) - np.exp(np.vdot(*PARAMETERS[2:4])) + 0.9
  np.testing.assert_allclose(weights.sum(-1), 1 - lam, atol=1e-5)
  columns = weights.sum(-2) / ((1 - lam) * N / M)
  assert np.abs(columns - 1).max() > 0.5
  assert weights.min() < 0


def test_empty_row_is_zero_and_has_a_gradient():
  def total(query):
    out = differential_attention(query, KEY, VALUE, mask=MASK, parameters=PARAMETERS)
    return (out**2).sum(), out

  slope, out = jax.jit(jax.grad(total, has_aux=True))(QUERY)
  np.testing.assert_array_equal(out[1, 3], 0)
  np.testing.assert_array_equal(slope[1, 3], 0)
  assert jnp.isfinite(slope).all()


def test_norm_of_each_head():
  expected = papers.rms_norm(
    np.float64(half(QUERY, KEY, VALUE)), np.float64(PARAMETERS.gain), 0.4
  )
  actual = CASES["differential"](QUERY, KEY, VALUE)
  np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_lambda_init_of_the_paper():
  np.testing.assert_allclose(lambda_init(1), 0.2)
  np.testing.assert_allclose(lambda_init(2), 0.8 - 0.6 * np.exp(-0.3))
  np.testing.assert_allclose(lambda_init(100), 0.8)
  with pytest.raises(ValueError, match=r"layer=0: expected layers counted from 1"):
    lambda_init(0)


def test_lambda_of_null_vectors_is_the_initial_one():
  null = DifferentialParameters(*(jnp.zeros(2) for _ in range(4)), gain=jnp.ones(3))
  np.testing.assert_allclose(differential_lambda(null, 0.35), 0.35, rtol=1e-6)


def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"head dimension 3: expected an even number"):
    differential_attention(QUERY[..., :3], KEY[..., :3], VALUE, parameters=PARAMETERS)
  wrong = PARAMETERS._replace(gain=jnp.ones(5))
  with pytest.raises(ValueError, match=r"parameters have shapes.*expected.*\(3,\)"):
    differential_attention(QUERY, KEY, VALUE, parameters=wrong)
