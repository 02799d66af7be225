"""Operators by name, and their plans against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fidelity import operator_milliseconds, plan_of
from asap_jax.compiler.operators import Sinkhorn, Softmax, operator_of

SHAPE = (2, 3, 6, 4)
QUERY, KEY = (
  jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0))
)
ACTIVATION = Activation(QUERY, KEY, None, None, None, None)
LOGITS = np.einsum("bhnd,bhmd->bhnm", np.float64(QUERY), np.float64(KEY))


def test_softmax_plan():
  weights = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
  plan = plan_of(ACTIVATION, operator_of(asap_jax.softmax_attention))
  np.testing.assert_allclose(plan, weights, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 4])
def test_sinkhorn_plan(iterations):
  function = functools.partial(asap_jax.sinkhorn_attention, iterations=iterations)
  plan = plan_of(ACTIVATION, operator_of(function))
  for b, h in np.ndindex(SHAPE[:2]):
    duals = oracles.closures(LOGITS[b, h], np.zeros(SHAPE[2]), iterations)
    np.testing.assert_allclose(
      plan[b, h], oracles.plan(LOGITS[b, h], *duals), atol=1e-5
    )


def test_iterations_that_are_not_bound_are_the_default():
  assert operator_of(asap_jax.sinkhorn_attention) == Sinkhorn(20, "ott")
  scaling = functools.partial(asap_jax.sinkhorn_attention, implementation="xla")
  assert operator_of(scaling) == Sinkhorn(20, "xla")


def test_compiled_operator_is_its_dual_map():
  dual_map = asap_jax.DualMap(jnp.ones((3, 2, 4)), jnp.zeros((3, 4)), ("query",))
  held = operator_of(asap_jax.AsapAttention(dual_map))
  plan = plan_of(ACTIVATION, held)
  # A map that predicts nothing leaves one iteration from zero.
  once = plan_of(ACTIVATION, Sinkhorn(1))
  np.testing.assert_allclose(plan, once, atol=1e-6)


def test_other_functions_are_refused():
  with pytest.raises(ValueError, match="expected an AsapAttention"):
    operator_of(lambda query, key, value: value)


def test_times_are_measured_for_each_operator():
  operators = [Softmax(), Sinkhorn(2), Sinkhorn(2, "ott")]
  times = operator_milliseconds(ACTIVATION, operators, repeats=1)
  assert len(times) == 3
  assert min(times) > 0.0
