"""Refining a dual map: descent on KL(teacher plan || closed plan), directions included.

With A = exp(S + f + g) closed from f_hat (rows exact) and the teacher's plan A_T,

  KL(A_T || A) = sum_ij A_T (log A_T - S_ij) - sum_i f_i - sum_j c_j g_j,

where c are the column sums of A_T and its rows sum to one. The first term does not
depend on the dual map, so what descends needs the teacher's column sums alone, not its
plan. The ridge fit is the start and the best parameters on held-out batches are the
result, which is never worse there than the start.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from asap_jax.c_transform import closure, plan
from asap_jax.dual_map import DualMap, dual_features, predict_dual
from asap_jax.sinkhorn import sinkhorn_source_dual
from asap_jax.surgery import Activation
from asap_jax.weights import mean, zero_invalid


class Sample(NamedTuple):
  """One call of a layer, with what refinement needs of its teacher.

  Attributes:
    activation: queries, keys and masks.
    columns: column sums of the teacher's plan, `[batch, heads, m]`.
    constant: the part of KL that the dual map does not change, mean over rows, `[]`.
  """

  activation: Activation
  columns: jax.Array
  constant: jax.Array


class Refined(NamedTuple):
  """Result of `refine`.

  Attributes:
    dual_map: the best on held-out samples, the start included.
    held_out_kl: mean KL there before the first step and at every check since.
    steps: taken when `dual_map` was found.
  """

  dual_map: DualMap
  held_out_kl: tuple[float, ...]
  steps: int


@functools.partial(jax.jit, static_argnames="iterations")
def sample_of(activation: Activation, iterations: int) -> Sample:
  """The sample of one call, for a teacher of so many full iterations."""
  logits = activation.logits
  masks = activation.query_mask, activation.key_mask
  source = sinkhorn_source_dual(logits, iterations, *masks)
  duals = closure(logits, source, *masks)
  teacher = plan(logits, duals, *masks)
  columns = teacher.sum(-2)
  entropy = jnp.sum(duals.f * teacher.sum(-1), -1) + jnp.sum(duals.g * columns, -1)
  return Sample(activation, columns, entropy.sum() / _rows(activation))


def refine(
  dual_map: DualMap,
  samples: Sequence[Sample],
  held_out: Sequence[Sample],
  *,
  steps: int,
  learning_rate: float = 2e-2,
  check_every: int = 100,
  patience: int = 5,
  seed: int = 0,
  description: str = "Refining",
  progress: bool = True,
) -> Refined:
  """Adam on the mean KL over weights and directions, warm-up and cosine decay.

  Host code: it does not run under jit, vmap or grad.

  Args:
    dual_map: where to start, for instance the ridge fit.
    samples: what to fit; a step takes one, in an order drawn by `seed`.
    held_out: what to judge by.
    steps: to take.
    learning_rate: of weights relative to the deviations of feature and dual.
    check_every: steps between looks at `held_out`.
    patience: looks without progress after which to stop.
    seed: of the order.
    description: of the progress bar.
    progress: whether to show it.

  Returns:
    `Refined`. If the KL turns non-finite, a warning says so and what was best before
    is returned.

  Raises:
    ValueError: if there is nothing to fit or to judge by, or `steps` is below one.
  """
  for name, given in (("samples", samples), ("held_out", held_out)):
    if not given:
      raise ValueError(f"{name} is empty: expected at least one")
  if steps < 1:
    raise ValueError(f"steps={steps}: expected at least one")
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, max(1, steps // 20), steps
  )
  transform = optax.adam(schedule, b2=0.99)
  scale = _weight_scale(samples[0], dual_map)
  parameters = dual_map.directions, dual_map.weights / scale
  state = transform.init(parameters)

  @jax.jit
  def step(parameters, state, sample):
    gradient = jax.grad(lambda p: mean_kl(_rebuild(dual_map, p, scale), sample))(
      parameters
    )
    updates, state = transform.update(gradient, state)
    return optax.apply_updates(parameters, updates), state

  def judge(parameters):
    current = _rebuild(dual_map, parameters, scale)
    return float(np.mean([_mean_kl(current, sample) for sample in held_out]))

  rng = np.random.default_rng(seed)
  losses = [judge(parameters)]
  best, best_step = parameters, 0
  order: list[int] = []
  for taken in track(
    range(1, steps + 1), description, disable=not progress, total=steps
  ):
    if not order:
      order = list(rng.permutation(len(samples)))
    parameters, state = step(parameters, state, samples[order.pop()])
    if taken % check_every and taken != steps:
      continue
    losses.append(judge(parameters))
    if not np.isfinite(losses[-1]):
      warnings.warn(
        f"{description}: KL is {losses.pop()} after {taken} steps; going back to "
        f"step {best_step}",
        stacklevel=2,
      )
      break
    if losses[-1] < min(losses[:-1]):
      best, best_step = parameters, taken
    elif taken - best_step >= patience * check_every:
      break
  return Refined(_rebuild(dual_map, best, scale), tuple(losses), best_step)


def mean_kl(dual_map: DualMap, sample: Sample) -> jax.Array:
  """KL(teacher || closed plan), mean over heads and valid rows; differentiable."""
  activation = sample.activation
  masks = activation.query_mask, activation.key_mask
  f_hat = predict_dual(dual_map, activation.query, activation.key, *masks)
  duals = closure(activation.logits, f_hat, *masks)
  closed = duals.f.sum() + jnp.sum(duals.g * sample.columns)
  return sample.constant - closed / _rows(activation)


_mean_kl = jax.jit(mean_kl)


def _rows(activation: Activation) -> jax.Array:
  ones = jnp.ones(activation.query.shape[:-1])
  return zero_invalid(ones, activation.query_mask).sum()


def _rebuild(
  dual_map: DualMap, parameters: tuple[jax.Array, jax.Array], scale: jax.Array
) -> DualMap:
  directions, weights = parameters
  return DualMap(directions, weights * scale, dual_map.features)


@jax.jit
def _weight_scale(sample: Sample, dual_map: DualMap) -> jax.Array:
  """Deviation of the dual over that of each feature, `[heads, features]`."""
  activation = sample.activation
  masks = activation.query_mask, activation.key_mask
  arguments = activation.query, activation.key
  features = dual_features(*arguments, dual_map.directions, dual_map.features, *masks)
  dual = predict_dual(dual_map, *arguments, *masks)
  variances = mean(features**2, masks[0], axis=-2).mean((0, 2))
  power = mean(dual**2, masks[0]).mean((0, 2))[:, None]
  return jnp.sqrt(
    jnp.where(variances > 0, power / jnp.where(variances > 0, variances, 1.0), 1.0)
  )
