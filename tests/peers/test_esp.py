"""What ESPFormer claims, and where soft sorting falls short of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peer_cases import (
  CASES,
  DIM,
  HEADS,
  JITTED,
  KEY,
  QUERY,
  QUERY_MASK,
  SQUARE_MASK,
  VALUE,
  N,
  forms_matrix,
  normal,
  sown_weights,
)

from asap_jax.metrics import column_error, row_error
from asap_jax.peers import esp_attention
from asap_jax.peers.esp import normalised_rows, soft_sort

INPUTS = QUERY, KEY[:, :N], VALUE[:, :N]


@jax.jit
def sort(*arguments):
  return normalised_rows(soft_sort(*arguments))


def errors(**options):
  weights = sown_weights(functools.partial(esp_attention, **options), *INPUTS)
  np.testing.assert_allclose(weights.sum((-2, -1)), N, rtol=1e-5)
  return float(row_error(weights).max()), float(column_error(weights).max())


def test_soft_plans_are_doubly_stochastic_only_as_the_temperature_vanishes():
  warm, cold = errors(sort_temperature=1.0), errors(sort_temperature=1e-6)
  assert min(warm) > 0.1
  assert max(cold) < 1e-3


def test_hard_plans_are_doubly_stochastic():
  assert max(errors(hard=True)) < 1e-5


def test_hard_is_the_limit_of_soft():
  soft = JITTED["esp"](*INPUTS, sort_temperature=1e-10)
  np.testing.assert_allclose(soft, JITTED["esp"](*INPUTS, hard=True), atol=1e-3)


def test_soft_permutations_sort():
  x = normal(3, 5)
  soft = sort(x, 1e-5)
  np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-6)
  actual = jnp.einsum("lsi,li->ls", soft, x)
  np.testing.assert_allclose(actual, jnp.sort(x, axis=-1), atol=1e-5)


def test_soft_permutations_leave_absent_points_out():
  x, mask = normal(3, 5), jnp.asarray([1, 0, 1, 1, 0], bool)
  soft = sort(x, 0.5, mask)
  np.testing.assert_allclose(soft.sum(-1), [[1, 1, 1, 0, 0]] * 3, atol=1e-6)
  np.testing.assert_array_equal(soft[..., ~np.asarray(mask)], 0)
  present = sort(x[:, np.asarray(mask)], 0.5)
  np.testing.assert_allclose(soft[:, :3, np.asarray(mask)], present, atol=1e-6)


def test_length_of_directions_does_not_matter():
  esp = CASES["esp"]
  directions = esp.learned["directions"]
  actual = esp(*INPUTS, directions=3 * directions)
  np.testing.assert_allclose(actual, esp(*INPUTS), atol=1e-5)


def test_hard_form_makes_no_matrix():
  inputs = [normal(1, 31, HEADS, DIM) for _ in range(3)]
  assert forms_matrix(esp_attention, *inputs)
  assert not forms_matrix(functools.partial(esp_attention, hard=True), *inputs)


def test_unequal_numbers_of_tokens_are_refused():
  with pytest.raises(ValueError, match=r"query has 6 tokens, key 9.*equal numbers"):
    esp_attention(QUERY, KEY, VALUE)
  mask = QUERY_MASK[:, None, :, None] & jnp.roll(SQUARE_MASK, 1, 0)[:, None, None]
  with pytest.raises(ValueError, match=r"valid queries and \[5 4\] valid keys"):
    esp_attention(*INPUTS, mask=mask)


def test_unequal_numbers_of_valid_tokens_are_nan_under_jit():
  keys = SQUARE_MASK.at[1, 0].set(False)
  mask = QUERY_MASK[:, None, :, None] & keys[:, None, None]
  out = CASES["esp"](*INPUTS, mask=mask)
  assert jnp.isfinite(out[0]).all()
  assert jnp.isnan(out[1]).all()
  assert jnp.isnan(CASES["esp hard"](*INPUTS, mask=mask)[1]).all()


def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"bias: esp_attention has no logits"):
    esp_attention(*INPUTS, jnp.zeros((N, N)))
  with pytest.raises(ValueError, match=r"directions have shape \(2, 3, 5\).*\[2, "):
    esp_attention(*INPUTS, directions=normal(HEADS, 3, DIM + 1))


def test_gradient_of_directions_in_hard_form_is_zero():
  def total(directions):
    return JITTED["esp"](*INPUTS, directions=directions, hard=True).sum()

  slope = jax.jit(jax.grad(total))(CASES["esp"].learned["directions"])
  np.testing.assert_array_equal(slope, 0)
