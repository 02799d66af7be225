"""How accelerators run the scaling domain: with one look at the sums, at the end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import WEIGHTS, on_device, random_logits

from asap_jax.c_transform import iterates, scaling_domain
from asap_jax.c_transform.iterates import scaled_iterates
from asap_jax.c_transform.scaling_domain import scaled_plan

COUNT = 5


@pytest.fixture
def elsewhere(monkeypatch):
  """What is compiled for all platforms but a CPU, on this one."""

  def default(*arguments, default, **_):
    return default(*arguments)

  monkeypatch.setattr(jax.lax, "platform_dependent", default)


@pytest.mark.parametrize("weights", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize("scale", [1.0, 150.0])
def test_plans_against_float64(weights, scale, elsewhere):
  weights = WEIGHTS[weights]
  logits, f = random_logits(scale=scale)
  duals = oracles.closures(logits, f, COUNT, *weights)
  wanted = oracles.plan(logits, *duals, *weights)
  given = on_device(weights)
  plain = jax.jit(lambda *x: scaled_plan(*x, COUNT, *given))(logits, f)
  finite = jnp.where(jnp.isfinite(logits), logits, 0.0)
  kept, _ = jax.jit(lambda *x: scaled_iterates(*x, COUNT, *given))(finite, f)
  for found in (plain, kept):
    np.testing.assert_allclose(found.dense(), wanted, atol=1e-5 * scale)


@pytest.mark.parametrize(("scale", "wanted"), [(1.0, True), (150.0, False)])
def test_sums_that_leave_their_range_are_told(scale, wanted):
  logits, f = (jnp.asarray(x, jnp.float32) for x in random_logits(scale=scale))
  nothing = (None,) * 2
  steps = (None,) * 2
  _, plain = scaling_domain._closed(COUNT, "query", False, logits, f, *nothing, *steps)
  _, kept = iterates._run(COUNT, None, False, logits, f, *nothing)
  assert bool(plain) == bool(kept) == wanted


def whiles(jaxpr):
  """Loops with a condition on data, those in the bodies of others left out."""
  found = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if name == "while":
      found += 1
      continue
    for parameter in equation.params.values():
      inner = getattr(parameter, "jaxpr", None)
      if inner is not None:
        found += whiles(inner) * (equation.params["length"] if name == "scan" else 1)
  return found


@pytest.mark.parametrize("form", ["plan", "iterates"])
def test_one_look_whatever_the_number_of_closures(form, elsewhere):
  logits, f = (jnp.asarray(x, jnp.float32) for x in random_logits())
  run = {
    "plan": functools.partial(scaling_domain._scaled_plan.fun, 20, "query"),
    "iterates": functools.partial(iterates._iterates.fun, 20, None),
  }[form]
  nothing = (None,) * (4 if form == "plan" else 2)
  jaxpr = jax.make_jaxpr(lambda *x: run(*x, *nothing))(logits, f)
  assert whiles(jaxpr.jaxpr) == 1
