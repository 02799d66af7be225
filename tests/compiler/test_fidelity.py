"""Operators by name, and their plans against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.compiler.clock import operator_milliseconds
from asap_jax.compiler.fidelity import plan_of
from asap_jax.compiler.operators import Sinkhorn, Softmax, operator_of
from asap_jax.teacher.starts import starting_dual

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


@pytest.mark.parametrize(
  "options",
  [
    {"iterations": 0, "start": "gaussian"},
    {"iterations": 2, "start": "gaussian"},
    {"iterations": 3, "start": "gaussian_diagonal", "relaxation": 1.5},
    {"iterations": 3, "relaxation": 1.5},
  ],
  ids=str,
)
def test_plan_of_bound_options_is_that_of_the_attention(options):
  function = functools.partial(
    asap_jax.sinkhorn_attention, implementation="xla", **options
  )
  operator = operator_of(function)
  assert operator == Sinkhorn(implementation="xla", **options)
  plan = plan_of(ACTIVATION, operator)
  # Values of the identity give the weights.
  value = jnp.broadcast_to(jnp.eye(SHAPE[2])[:, None], (2, SHAPE[2], 3, SHAPE[2]))
  query, key = (jnp.moveaxis(x, 1, 2) for x in (QUERY, KEY))
  weights = jax.jit(lambda *tokens: function(*tokens, scale=1.0))(query, key, value)
  np.testing.assert_allclose(plan, jnp.moveaxis(weights, 1, 2), atol=1e-5)
  # From the start on the plan is that of closures.
  f = starting_dual(options.get("start", "zero"), QUERY, KEY)
  omega = np.full(options["iterations"], options.get("relaxation", 1.0))
  for b, h in np.ndindex(SHAPE[:2]) if options["iterations"] else ():
    duals = oracles.closures(LOGITS[b, h], f[b, h], len(omega), relaxation=omega)
    expected = oracles.plan(LOGITS[b, h], *duals)
    np.testing.assert_allclose(plan[b, h], expected, atol=1e-5)


def test_iterations_that_are_not_bound_are_the_default():
  assert operator_of(asap_jax.sinkhorn_attention) == Sinkhorn(20)
  scaling = functools.partial(asap_jax.sinkhorn_attention, implementation="xla")
  assert operator_of(scaling) == Sinkhorn(20, "xla")


def test_compiled_operator_is_its_dual_map():
  dual_map = asap_jax.DualMap(jnp.ones((3, 2, 4)), jnp.zeros((3, 4)), ("query",))
  held = operator_of(asap_jax.AsapAttention(dual_map))
  plan = plan_of(ACTIVATION, held)
  # A map that predicts nothing leaves one iteration from zero.
  once = plan_of(ACTIVATION, Sinkhorn(1))
  np.testing.assert_allclose(plan, once, atol=1e-6)


def test_compiled_operator_of_the_key_side():
  weights = 0.3 * jax.random.normal(jax.random.key(1), (3, 6))
  half = asap_jax.DualMap(
    jnp.ones((3, 2, 4)), weights, ("query", "cumulants"), side="key", half=True
  )
  held = operator_of(asap_jax.AsapAttention(half))
  plan = plan_of(ACTIVATION, held)
  g = asap_jax.predict_dual(half, QUERY, KEY)
  expected = jax.nn.softmax(LOGITS + g[..., None, :], axis=-1)
  np.testing.assert_allclose(plan, expected, atol=1e-6)
  # It predicts no dual of the queries, which a residual could be of.
  assert held.duals(ACTIVATION)[1] is None


def test_other_functions_are_refused():
  with pytest.raises(ValueError, match="expected an AsapAttention"):
    operator_of(lambda query, key, value: value)


def test_times_are_measured_for_each_operator():
  operators = [Softmax(), Sinkhorn(2), Sinkhorn(2, "ott")]
  times = operator_milliseconds(ACTIVATION, operators)
  assert len(times) == 3
  assert min(times) > 0.0
