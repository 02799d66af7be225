"""Fitting by the dual objective instead of the teacher's plan."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import models, oracles

import asap_jax
from asap_jax.compiler.fitting.stages import fit_layers
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recording import Observer

# Nothing is sorted: what compiles fast.
OPTIONS = Recipe(
  slices=1,
  closures=1,
  directions="gaussian",
  features=("query", "cumulants"),
  hidden=0,
  ridge=1e-6,
  refine_steps=40,
  objective="dual",
)
BATCHES = models.batches()[:3]


@functools.cache
def teacher():
  return Observer(
    models.toy(depth=1), BATCHES, lambda model, batch: model(batch), progress=False
  )


@functools.cache
def fitted(seed=0, **options):
  (layer,) = fit_layers(teacher(), dataclasses.replace(OPTIONS, **options), seed)
  return layer.dual_map


def log_plan(logits, duals):
  return logits + duals[0][:, None] + duals[1]


@functools.cache
def problems():
  """Queries and keys held out, and for every head logits, teacher's and best plan."""
  ((calls,),) = teacher().activations("", held_out=True)
  query, key = calls[0].query, calls[0].key
  logits = np.einsum("bhnd,bhmd->bhnm", np.float64(query), np.float64(key))
  found = []
  for each in logits.reshape(-1, models.TOKENS, models.TOKENS):
    start = np.zeros(models.TOKENS)
    counts = models.ITERATIONS, 300
    logs = [log_plan(each, oracles.closures(each, start, count)) for count in counts]
    found.append((each, *logs))
  return query, key, found


def losses(dual_map):
  """Per row: minus the dual objective, KL to the converged plan, to the teacher's."""
  query, key, found = problems()
  duals = np.asarray(asap_jax.predict_dual(dual_map, query, key))
  sums = np.zeros(3)
  for f, (logits, of_teacher, best) in zip(
    duals.reshape(-1, models.TOKENS), found, strict=True
  ):
    closed = oracles.closures(logits, f, 1)
    own = log_plan(logits, closed)
    sums[0] -= sum(dual.sum() for dual in closed)
    sums[1:] += [np.sum(np.exp(p) * (p - own)) for p in (best, of_teacher)]
  return sums / duals.size


@pytest.mark.slow
def test_the_objective_is_better_on_what_is_held_out():
  before, after = losses(fitted(refine_steps=0)), losses(fitted())
  assert after[0] < before[0]
  # They differ by the optimal value alone.
  np.testing.assert_allclose(before[0] - after[0], before[1] - after[1], atol=1e-5)
  assert after[1] < 0.98 * before[1]


@pytest.mark.slow
def test_objectives_part_where_the_teacher_has_not_converged():
  by_objective, by_plan = losses(fitted()), losses(fitted(objective="plan"))
  assert by_objective[1] < by_plan[1]
  assert by_plan[2] < by_objective[2]


@pytest.mark.slow
def test_the_seed_alone_decides():
  first, other = (fitted(hidden=4, seed=seed) for seed in (0, 1))
  fitted.cache_clear()
  again = fitted(hidden=4)
  for one, two in zip(*map(jax.tree.leaves, (first, again)), strict=True):
    np.testing.assert_array_equal(one, two)
  assert not np.array_equal(first.weights, other.weights)


@pytest.mark.slow
def test_a_network_without_slices_is_compiled():
  compiled, report = models.compile_recipe(
    models.toy(depth=1),
    BATCHES,
    slices=1,
    directions="gaussian",
    features=("query",),
    hidden=4,
    refine_steps=40,
    objective="dual",
  )
  held = compiled.blocks[0].attention.attention_fn.dual_map
  start = losses(fitted(refine_steps=0, features=("query",)))
  assert held.network is not None
  assert losses(held)[0] < start[0]
  assert report.layers[0].chosen == "asap"
  np.testing.assert_allclose(report.layers[0].kl.mean(), losses(held)[2], rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_objective_is_refused():
  with pytest.raises(ValueError, match="objective='kl'"):
    models.compile_recipe(models.toy(depth=1), BATCHES, 1, objective="kl")
