"""Compiling by the dual objective instead of the teacher's plan."""

import functools

import jax
import models
import numpy as np
import oracles
import pytest

import asap_jax
from asap_jax.observe import Observer

TEACHER = functools.cache(lambda: models.toy(depth=1))


@functools.cache
def compile(steps=60, **options):
  return asap_jax.compile(
    TEACHER(),
    models.batches()[:3],
    **({"slices": 4, "hidden": 8, "objective": "dual"} | options),
    refine=steps > 0,
    refine_steps=steps,
    progress=False,
  )


def dual_map_of(result):
  return result.model.blocks[0].attention.attention_fn.dual_map


@functools.cache
def held_out():
  """Queries and keys of the held-out batch."""
  watched = Observer(
    TEACHER(), models.batches()[:3], lambda model, batch: model(batch), False
  )
  ((calls,),) = watched.activations("", held_out=True)
  return calls[0].query, calls[0].key


def losses(result):
  """Minus the dual objective of closed duals, and KL(converged plan || closed plan).

  In float64, means over rows and heads of the held-out batch.
  """
  query, key = held_out()
  f = np.asarray(asap_jax.predict_dual(dual_map_of(result), query, key))
  logits = np.einsum("bhnd,bhmd->bhnm", np.float64(query), np.float64(key))
  found = []
  for b, h in np.ndindex(logits.shape[:2]):
    closed = oracles.closures(logits[b, h], f[b, h], 1)
    best = oracles.closures(logits[b, h], np.zeros(models.TOKENS), 2000)
    plans = [oracles.plan(logits[b, h], *duals) for duals in (closed, best)]
    divergence = np.sum(plans[1] * np.log(plans[1] / plans[0]))
    found.append([-closed[0].sum() - closed[1].sum(), divergence])
  return np.mean(found, axis=0) / models.TOKENS


def test_refinement_by_the_objective_is_better_on_what_is_held_out():
  ridge, refined = compile(steps=0), compile()
  before, after = losses(ridge), losses(refined)
  # They differ by the optimal value alone.
  np.testing.assert_allclose(before[0] - after[0], before[1] - after[1], atol=1e-5)
  assert after[1] < 0.9 * before[1]
  assert dual_map_of(refined).network is not None
  assert refined.report.layers[0].chosen == "asap"


def test_what_the_objective_makes_worse_is_taken_back():
  # Steps in vain: what stays is the start.
  start, end = losses(compile(steps=0)), losses(compile(steps=1))
  assert end[0] <= start[0] + 1e-6


def test_objectives_part_where_the_teacher_has_not_converged():
  by_objective, by_plan = compile(), compile(objective="plan")
  assert losses(by_objective)[1] < losses(by_plan)[1]
  assert by_plan.report.layers[0].kl.mean() < by_objective.report.layers[0].kl.mean()


def test_the_seed_alone_decides():
  compile.cache_clear()
  first, other = dual_map_of(compile(4)), dual_map_of(compile(4, seed=1))
  compile.cache_clear()
  again = dual_map_of(compile(4))
  for one, two in zip(*map(jax.tree.leaves, (first, again)), strict=True):
    np.testing.assert_array_equal(one, two)
  assert not np.array_equal(first.weights, other.weights)


def test_a_network_without_slices_is_compiled():
  options = {"features": ("query",), "slices": 1}
  result = compile(**options)
  assert dual_map_of(result).weights.shape == (models.HEADS, models.WIDTH // 2)
  assert losses(result)[1] < 0.9 * losses(compile(steps=0, **options))[1]
  x = models.batches()[1]
  assert np.isfinite(models.forward(result.model, x)).all()


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_objective_is_refused():
  with pytest.raises(ValueError, match="objective='kl': expected 'plan' or 'dual'"):
    compile(objective="kl")
