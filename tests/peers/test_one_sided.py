"""One-sided attention, with duals that it predicts exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peer_cases import (
  DIM,
  DUAL_MAP,
  HEADS,
  JITTED,
  KEY,
  QUERY,
  SCALE,
  VALUE,
  M,
  normal,
  sown_weights,
)

from asap_jax.dual_map.features import dual_features
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import centre
from asap_jax.metrics import column_error, row_error
from asap_jax.peers import one_sided_attention, softmax_attention
from asap_jax.teacher.sinkhorn import sinkhorn_duals


def test_rows_are_exact():
  function = functools.partial(one_sided_attention, dual_map=DUAL_MAP)
  weights = sown_weights(function, QUERY, KEY, VALUE)
  np.testing.assert_allclose(row_error(weights), 0, atol=1e-5)


@pytest.mark.slow
def test_exact_prediction_gives_sinkhorn_and_its_columns():
  # As many features as keys: the regression of one sequence's duals is exact.
  query, key, value = QUERY[:1], KEY[:1], VALUE[:1]
  directions = normal(HEADS, M, DIM)

  @jax.jit
  def regression():
    q, k = (jnp.moveaxis(x, -2, -3) for x in (query, key))
    logits = SCALE * jnp.einsum("bhnd,bhmd->bhnm", q, k)
    target = centre(sinkhorn_duals(logits, 100).g, None)
    return dual_features(SCALE * k, q, directions), target

  features, target = regression()
  weights = [
    np.linalg.lstsq(np.float64(x), np.float64(y))[0]
    for x, y in zip(features[0], target[0], strict=True)
  ]
  dual_map = DualMap(directions, jnp.asarray(np.stack(weights), jnp.float32))

  function = functools.partial(one_sided_attention, dual_map=dual_map)
  expected = JITTED["sinkhorn"](query, key, value, iterations=100)
  actual = JITTED["one_sided"](query, key, value, dual_map=dual_map)
  np.testing.assert_allclose(actual, expected, atol=1e-3)
  error, plain = (
    column_error(sown_weights(f, query, key, value)).max()
    for f in (function, softmax_attention)
  )
  assert error < 1e-3
  assert plain > 0.5


def test_null_map_is_softmax():
  nothing = jax.tree.map(jnp.zeros_like, DUAL_MAP)
  actual = JITTED["one_sided"](QUERY, KEY, VALUE, dual_map=nothing)
  expected = JITTED["softmax"](QUERY, KEY, VALUE)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_dual_map_of_other_heads_is_refused():
  with pytest.raises(ValueError, match=r"dual_map was calibrated for 1 heads"):
    one_sided_attention(
      QUERY, KEY, VALUE,
      dual_map=DualMap(DUAL_MAP.directions[:1], DUAL_MAP.weights[:1]),
    )  # fmt: skip
