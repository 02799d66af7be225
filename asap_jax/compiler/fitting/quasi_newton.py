"""Fitting linear dual maps by L-BFGS, in seconds.

The features of a linear map without learned directions are computed once, and the plan
of the teacher too (`relative`), so that a step costs two products of a matrix and a
vector a closure. Forty steps on a few hundred sequences end where thousands of Adam's
end. Features are whitened, such that all weights are of one size.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from asap_jax.compiler.fitting.relative import (
  Factors,
  Relative,
  closed,
  divergence,
  half_closed,
  total_variation,
)
from asap_jax.dual_map.predict import DualMap
from asap_jax.numerics import exact_einsum

# Steps between two looks at what is held out, and progress there that is worth more.
_CHUNK, _WORTH = 10, 0.02
# All that later looks may gain, in what the last one gained.
_PROMISE = 2.0
_MEMORY = 12
# Closures that can follow a map here.
MOST = 10
# Numbers of closures so near to each other that one fit begins where another ended.
_NEAR = 1
# Over-relaxation and momentum that fits start from: in the range where most end.
_RELAXATION, _SPEED = 1.5, 0.3


class Problem(NamedTuple):
  """Sequences of one length, with the features of their points.

  Attributes:
    relative: plans of the teacher.
    features: `[heads, batch, points, features]`, centred.
  """

  relative: Relative
  features: Float[Array, "*heads batch points features"]


class Fitted(NamedTuple):
  """Result of `fit`.

  Attributes:
    dual_map: the best on held-out sequences.
    tv: its total variation there, mean over heads and rows.
    steps: taken, of the head that took most.
  """

  dual_map: DualMap
  tv: float
  steps: int


class _Parameters(NamedTuple):
  """Weights of whitened features, `[heads, features]`, and factors between closures."""

  weights: Array
  factors: Factors


class LinearFitter:
  """Fits the linear maps of one layer from one kind of features, closure by closure.

  Each fit starts where one with a closure more or less ended, or from a regression. One
  compiled function serves all numbers, and all kinds of features that are padded to one
  width.
  Host code: it does not run under jit, vmap or grad.

  Args:
    dual_map: features, directions and side; its weights do not matter. From the key
      side it is followed by half a closure.
    problems: to fit on.
    targets: duals to regress on for a start, `[heads, batch, points, targets]` of each.
      From the query side the teacher's, of its first iteration and on: each number of
      closures starts from what they may stand for (`_target`).
    held_out: to stop by, and to measure total variation on.
    width: to pad features to.
  """

  def __init__(
    self,
    dual_map: DualMap,
    problems: Sequence[Problem],
    targets: Sequence[Array],
    held_out: Sequence[Problem],
    width: int = 0,
  ):
    self._dual_map = dual_map
    basis = _whitening([problem.features for problem in problems])
    size = basis.shape[1]
    self._basis = jnp.pad(basis, ((0, 0), (0, 0), (0, max(width - size, 0))))
    self._problems, self._held_out = (
      [each._replace(features=_whitened(each.features, self._basis)) for each in group]
      for group in (problems, held_out)
    )
    moments = sum(
      _moments(problem.features, target)
      for problem, target in zip(self._problems, targets, strict=True)
    )
    points = sum(target[0, ..., 0].size for target in targets)
    # Whitened features have the unit matrix as their covariance.
    self._regressed = moments / points
    self._ends: dict[int, _Parameters] = {}

  def fit(self, count: int, steps: int = 60, target_tv: float = 1.0) -> Fitted:
    """The map that so many closures follow; zero, half a one, from the key side.

    Steps end early where the map is not going to come within `target_tv`.
    """
    best = self._start(count)
    options = {"count": jnp.int32(count), "half": count == 0}
    kl, tv = _judge(best, self._held_out, **options)
    parameters, state, kept = best, _initial(best), 0
    for taken in range(_CHUNK, steps + 1, _CHUNK):
      parameters, state = _descend(parameters, state, self._problems, **options)
      new_kl, new_tv = _judge(parameters, self._held_out, **options)
      better = new_kl < kl
      if not better.any():
        break
      before = tv
      worth = (new_kl < (1.0 - _WORTH) * kl).any()
      best = jax.tree.map(functools.partial(_where, better), parameters, best)
      kl, tv = jnp.where(better, new_kl, kl), jnp.where(better, new_tv, tv)
      kept = taken
      # What is gained falls by a third or more from look to look.
      hopeless = tv.mean() - _PROMISE * (before - tv).mean() > target_tv
      if hopeless or not worth:
        break
    self._ends[count] = best
    relaxation, momentum = (factors[:, : max(count - 1, 0)] for factors in best.factors)
    fitted = dataclasses.replace(
      self._dual_map,
      weights=exact_einsum("hpq,hq->hp", self._basis, best.weights),
      relaxation=relaxation if count > 1 else None,
      # Before the third closure there is no step to repeat.
      momentum=momentum if count > 2 else None,
      half=count == 0,
    )
    return Fitted(fitted, float(tv.mean()), kept)

  def _start(self, count: int) -> _Parameters:
    """Where a fit begins: the end of one nearby, or a regression."""
    near = min(self._ends, key=lambda other: (abs(other - count), other), default=None)
    if near is not None and abs(near - count) <= _NEAR:
      return _continued(self._ends[near], near, count)
    weights = self._regressed[..., _target(count, self._regressed.shape[-1])]
    heads = len(weights)
    ones = jnp.ones((heads, MOST - 1))
    return _Parameters(weights, Factors(_RELAXATION * ones, _SPEED * ones))


def _target(count: int, iterations: int) -> int:
  """Place of the dual that so many closures start from to end where a teacher does.

  An accelerated closure stands for about two iterations; the first is a plain one.
  """
  return max(iterations - 2 * max(count, 1), 0)


# More evaluations in a line search end nowhere better: heads wait for the slowest.
_LBFGS = optax.lbfgs(
  memory_size=_MEMORY,
  linesearch=optax.scale_by_zoom_linesearch(
    max_linesearch_steps=3, initial_guess_strategy="one"
  ),
)


@jax.jit
def _initial(parameters):
  """States of the heads, of the very types that a step returns: one program serves all.

  Optax begins with weakly typed numbers.
  """
  state = jax.vmap(_LBFGS.init)(parameters)
  return jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)


@functools.partial(jax.jit, static_argnames="half")
def _descend(parameters, state, problems, *, count, half):
  """A chunk of steps of every head."""

  def of_head(parameters, state, problems):
    def loss(parameters):
      return _mean(parameters, problems, count, half, divergence)

    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry, _):
      parameters, state = carry
      value, gradient = value_and_grad(parameters, state=state)
      updates, state = _LBFGS.update(
        gradient, state, parameters, value=value, grad=gradient, value_fn=loss
      )
      return (optax.apply_updates(parameters, updates), state), None

    carry, _ = jax.lax.scan(step, (parameters, state), length=_CHUNK)
    return carry

  return jax.vmap(of_head)(parameters, state, problems)


@functools.partial(jax.jit, static_argnames="half")
def _judge(parameters, problems, *, count, half):
  """Mean divergence and total variation over the rows of each head."""

  def of_head(parameters, problems):
    return tuple(
      _mean(parameters, problems, count, half, measure)
      for measure in (divergence, total_variation)
    )

  return jax.vmap(of_head)(parameters, problems)


def _mean(parameters, problems, count, half, measure):
  """A measure of closed plans, mean over the rows of one head."""
  total = rows = 0.0
  for problem in problems:
    dual = exact_einsum("bnp,p->bn", problem.features, parameters.weights)
    if half:
      found = half_closed(problem.relative, dual)
    else:
      found = closed(problem.relative, dual, count, parameters.factors)
    total = total + measure(problem.relative, found)
    rows = rows + problem.relative.rows.sum()
  return total / rows


def _where(better: Array, new: Array, old: Array) -> Array:
  """New leaves of the heads that became better."""
  return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _continued(parameters: _Parameters, before: int, count: int) -> _Parameters:
  """Parameters to start with: factors of new closures are those of the last one."""
  if not 1 < before < count:
    return parameters
  relaxation = parameters.factors.relaxation
  last = relaxation[:, before - 2 : before - 1]
  relaxation = relaxation.at[:, before - 1 :].set(last)
  return parameters._replace(factors=parameters.factors._replace(relaxation=relaxation))


def _whitening(features: Sequence[Array]) -> Array:
  """A basis of each head's features in which they are uncorrelated and of unit size.

  Directions that hold less than a millionth of the variance are left out.
  """
  flat = np.concatenate(
    [
      np.asarray(each, np.float64).reshape(each.shape[0], -1, each.shape[-1])
      for each in features
    ],
    axis=1,
  )
  gram = flat.swapaxes(-1, -2) @ flat / flat.shape[1]
  size = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
  size = np.where(size > 0, size, 1.0)
  values, vectors = np.linalg.eigh(gram / (size[:, :, None] * size[:, None, :]))
  kept = values > 1e-6 * gram.shape[-1]
  scale = np.where(kept, 1.0 / np.sqrt(np.where(kept, values, 1.0)), 0.0)
  return jnp.asarray(vectors * scale[:, None, :] / size[:, :, None], jnp.float32)


@jax.jit
def _whitened(features: Array, basis: Array) -> Array:
  return exact_einsum("hbnp,hpq->hbnq", features, basis)


@jax.jit
def _moments(features: Array, target: Array) -> Array:
  return exact_einsum("hbnq,hbnt->hqt", features, target)
