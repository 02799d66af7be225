"""Linear maps by L-BFGS, judged by the operators that they make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import models

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import plan
from asap_jax.compiler.candidates import FAMILIES
from asap_jax.compiler.fitting.quasi_newton import (
  MOST,
  LinearFitter,
  Problem,
  _descend,
  _initial,
  _Parameters,
)
from asap_jax.compiler.fitting.relative import Factors, relative_of
from asap_jax.compiler.operators import Asap, Sinkhorn
from asap_jax.compiler.prepared import (
  PreparedLayer,
  _features,
  _trajectory,
  fidelity_tv,
)
from asap_jax.compiler.recording import Observer
from asap_jax.dual_map.features import feature_count
from asap_jax.dual_map.predict import DualMap

FAMILY = {family.name: family for family in FAMILIES}


@functools.cache
def prepared():
  teacher = Observer(
    models.toy(depth=1), models.batches(), lambda model, batch: model(batch), False
  )
  calls, held_out = (
    [call for (of_layer,) in part for call in of_layer] for part in teacher.sample(64)
  )
  return PreparedLayer(teacher.layers[0], calls, held_out, teacher.timed[0], seed=0)


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("diagonal", 1),
    pytest.param("cumulants", 3, marks=pytest.mark.slow),
    pytest.param("half, diagonal", 0, marks=pytest.mark.slow),
    pytest.param("diagonal", 10, marks=pytest.mark.slow),
  ],
)
def test_the_tv_of_a_fit_is_that_of_its_operator(name, count):
  layer = prepared()
  operator, tv = layer.fit(FAMILY[name], count)
  assert isinstance(operator, Asap)
  assert operator.dual_map.closures == count
  own = fidelity_tv(layer.held_out, operator, layer.layer.site.teacher)
  np.testing.assert_allclose(tv, own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("cumulants", 1),
    pytest.param("half, diagonal", 0, marks=pytest.mark.slow),
  ],
)
def test_a_fit_comes_closer_than_the_regression_that_it_starts_from(name, count):
  layer = prepared()
  before, after = (layer._new_fitter(FAMILY[name]).fit(count, n) for n in (0, 60))
  assert (before.steps, after.steps > 0) == (0, True)
  assert after.tv < before.tv


def test_a_fit_without_hope_ends_early():
  own, _ = parts("query")
  ended, whole = (fitter(*own).fit(3, target_tv=target) for target in (0.0, 1.0))
  assert ended.steps < whole.steps
  assert ended.tv > whole.tv > 0.0
  # What is within reach is fitted to the end.
  assert fitter(*own).fit(3, target_tv=1.5 * whole.tv).steps == whole.steps


def test_steps_return_the_types_that_they_take():
  """Or the second ten of them would be compiled anew."""
  (_, problem, *_), _ = parts("query")
  size = problem.features.shape[-1]
  start = _Parameters(
    jnp.zeros((HEADS, size)), Factors(*(jnp.ones((HEADS, MOST - 1)) for _ in range(2)))
  )
  given = start, _initial(start)
  run = functools.partial(_descend, count=jnp.int32(1), half=False)
  found = jax.eval_shape(run, *given, [problem])
  for before, after in zip(*map(jax.tree.leaves, (given, found)), strict=True):
    assert before.dtype == after.dtype
    assert before.weak_type == after.weak_type


@pytest.mark.slow
def test_more_closures_come_closer_and_beat_as_many_iterations():
  layer = prepared()
  tvs = [layer.fit(FAMILY["diagonal"], count)[1] for count in (1, 2, 3)]
  assert tvs[2] < tvs[1] < tvs[0]
  cut = layer.tv_of_iterations(3)
  assert all(tv < of_cut for tv, of_cut in zip(tvs, cut, strict=True))


def test_a_teacher_cut_by_none_of_its_iterations_is_itself():
  found = prepared().tv_of_iterations(models.ITERATIONS)
  assert found[-1] < 1e-5
  assert sorted(found, reverse=True) == found


HEADS, DIM, SIZES = 2, 4, (7, 9)
TEACHER = Sinkhorn(6)
LINEAR = ("query", "cumulants", "gaussian_diagonal")


def padded(seed):
  """Twelve sequences of more keys than queries, of tokens around a few prototypes."""
  random = np.random.default_rng(seed)
  prototypes = np.random.default_rng(9).normal(size=(2, 4, HEADS, DIM))
  tokens, masks = [], []
  for size, of_side in zip(SIZES, prototypes, strict=True):
    points = of_side[random.integers(4, size=(12, size))]
    points = points + 0.5 * random.normal(size=points.shape)
    # The second head is sharper.
    points = points.swapaxes(1, 2) * np.array([1.0, 1.5])[:, None, None]
    masks.append(jnp.arange(size) < random.integers(4, size + 1, size=(12, 1, 1)))
    tokens.append(jnp.asarray(points, jnp.float32) * masks[-1][..., None])
  return Activation(*tokens, None, *masks)


@functools.cache
def parts(side):
  """What a fitter of both heads takes, and the held-out call."""
  columns = feature_count(LINEAR, 1, DIM)
  blank = DualMap(
    jnp.ones((HEADS, 1, DIM)), jnp.zeros((HEADS, columns)), LINEAR, side=side
  )
  calls = padded(0), padded(1)
  fitted, held_out = (
    Problem(relative_of(call, TEACHER), _features(call, blank)) for call in calls
  )
  if side == "key":
    target = fitted.relative.duals[1][..., None]
  else:
    target = _trajectory(calls[0], TEACHER, TEACHER.iterations)
  return (blank, fitted, target, held_out), calls[1]


def of_head(head, tree):
  """The same of one head alone."""
  return jax.tree.map(lambda leaf: leaf[head : head + 1], tree)


def fitter(blank, *groups):
  return LinearFitter(blank, *([group] for group in groups))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 0])
def test_the_tv_of_a_fit_to_padded_sequences_is_that_of_its_operator(count):
  own, held_out = parts("query" if count else "key")
  fitted = fitter(*own).fit(count)
  found = fidelity_tv([held_out], Asap(fitted.dual_map), TEACHER)
  np.testing.assert_allclose(fitted.tv, found, rtol=1e-3)
  assert fitted.dual_map.closures == count
  # From zero as many closures, or one instead of a half, end farther away.
  assert found < fidelity_tv([held_out], Sinkhorn(max(count, 1)), TEACHER)


@pytest.mark.slow
def test_heads_are_fitted_as_they_would_be_alone():
  own, _ = parts("query")
  # One look at what is held out: after it a head alone may stop earlier.
  both = fitter(*own).fit(2, steps=10).dual_map
  for head in range(HEADS):
    alone = fitter(*(of_head(head, each) for each in own)).fit(2, steps=10).dual_map
    pairs = zip(*map(jax.tree.leaves, (of_head(head, both), alone)), strict=True)
    for one, other in pairs:
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_head_that_gets_worse_stays_at_its_start_while_another_goes_on():
  (*own, problem), held_out = parts("query")
  start = fitter(*own, problem).fit(1, steps=0).dual_map
  # For the first head, hold out plans of the start itself: no step comes closer.
  duals, _ = Asap(start).duals(held_out)
  plans = plan(held_out.logits, duals, *held_out.masks)
  relative = problem.relative._replace(
    plan=problem.relative.plan.at[0].set(plans[:, 0]),
    duals=tuple(
      of_teacher.at[0].set(of_start[:, 0])
      for of_teacher, of_start in zip(problem.relative.duals, duals, strict=True)
    ),
  )
  fitted = fitter(*own, problem._replace(relative=relative)).fit(1).dual_map
  moved = np.abs(fitted.weights - start.weights).max(-1)
  assert moved[0] == 0.0
  assert moved[1] > 1e-2
