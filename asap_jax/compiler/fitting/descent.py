"""Refining a dual map: descent on KL(teacher plan || closed plan), directions included.

With A = exp(S + f + g) closed from f_hat (rows exact) and the teacher's plan A_T,

  KL(A_T || A) = sum_ij A_T (log A_T - S_ij) - sum_i f_i - sum_j c_j g_j,

where c are the column sums of A_T and its rows sum to one. The first term does not
depend on the dual map, so what descends needs the teacher's column sums alone, not its
plan. With the exact column sums in their place it is minus the dual objective
(`asap_jax.compiler.fitting.objective`). The ridge fit is the start and the best
parameters on held-out batches are the result, which is never worse there than the
start.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from asap_jax.c_transform.entropic import row_sums
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.compiler.fitting.samples import Sample, minibatches
from asap_jax.compiler.fitting.scales import parameter_scale
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import zero_invalid

# Of a network's weights, whose many parameters would otherwise learn single sequences.
_WEIGHT_DECAY = 1.0


# Heads times queries times keys of a step, and of a look at what is held out.
_PAIRS_OF_STEP, _PAIRS_OF_CHECK = 2**20, 2**24


class Refined(NamedTuple):
  """Result of `Refiner`.

  Attributes:
    dual_map: the best on held-out samples, the start included.
    held_out_kl: mean KL there before the first step and at every check since; minus
      the dual objective per row where the samples are `objective_sample`s.
    steps: taken when `dual_map` was found.
  """

  dual_map: DualMap
  held_out_kl: tuple[float, ...]
  steps: int


class Refiner:
  """Adam on the mean KL, warm-up and cosine decay, over all parameters of a dual map.

  Samples may come in parts, so that not all need to be in memory at once. Host code: it
  does not run under jit, vmap or grad.

  Args:
    dual_map: where to start, for instance the ridge fit.
    pools: samples, joined (`asap_jax.compiler.fitting.samples.pooled`), to scale
      parameters by.
    held_out: samples to judge by.
    steps: to take in all; the schedule ends with them.
    learning_rate: relative to the deviations of features and dual.
    batch_size: most sequences in a step; long ones are taken fewer at a time.
    patience: checks, of which there are twenty, without progress after which to stop.
    seed: of the order of samples.
    description: of the progress bar.
    progress: whether to show it.

  Raises:
    ValueError: if there is nothing to fit or to judge by, or `steps` is below one.
  """

  def __init__(
    self,
    dual_map: DualMap,
    pools: Sequence[Sample],
    held_out: Sequence[Sample],
    *,
    steps: int,
    learning_rate: float = 5e-3,
    batch_size: int = 32,
    patience: int = 5,
    seed: int = 0,
    description: str = "Refining",
    progress: bool = True,
  ):
    for name, given in (("pools", pools), ("held_out", held_out)):
      if not given:
        raise ValueError(f"{name} is empty: expected at least one sample")
    if steps < 1:
      raise ValueError(f"steps={steps}: expected at least one")
    # A step is worth as much on a few long sequences as on many short ones.
    pairs = max(map(_pairs, [*pools, *held_out]))
    batch_size = min(batch_size, max(_PAIRS_OF_STEP // pairs, 4))
    judged = max(_PAIRS_OF_CHECK // pairs, 16)
    self._held_out = [_first(sample, judged) for sample in held_out]
    self._steps = steps
    self._check_every = max(1, steps // 20)
    self._patience = patience
    self._batch_size = batch_size
    self._random = np.random.default_rng(seed)
    self._description, self._progress = description, progress
    first = next(minibatches(pools, batch_size, np.random.default_rng(seed)))
    self._scale = parameter_scale(dual_map, first)
    self._parameters = jax.tree.map(jnp.divide, dual_map, self._scale)
    warm_up = max(1, steps // 20)
    schedule = optax.warmup_cosine_decay_schedule(
      0.0, learning_rate, warm_up, max(steps, warm_up + 1)
    )
    self._transform = optax.adamw(
      schedule, b2=0.99, weight_decay=_WEIGHT_DECAY, mask=_decayed
    )
    self._state = self._transform.init(self._parameters)
    self._best, self._best_step, self._taken = dual_map, 0, 0
    self._losses = [self._judge(dual_map)]

  @property
  def result(self) -> Refined:
    """The best so far."""
    return Refined(self._best, tuple(self._losses), self._best_step)

  @property
  def finished(self) -> bool:
    """Whether all steps are taken, patience has ended or the loss was not finite."""
    stale = self._taken - self._best_step >= self._patience * self._check_every
    return self._taken >= self._steps or stale or not np.isfinite(self._losses[-1])

  def run(self, pools: Sequence[Sample], steps: int) -> None:
    """Takes up to so many of the remaining steps on these samples."""
    batches = minibatches(pools, self._batch_size, self._random)
    steps = min(steps, self._steps - self._taken)
    for _ in track(range(steps), self._description, disable=not self._progress):
      if self.finished:
        break
      self._parameters, self._state = _step(
        self._parameters, self._state, self._scale, next(batches), self._transform
      )
      self._taken += 1
      if self._taken % self._check_every == 0 or self._taken == self._steps:
        self._check()

  def _check(self) -> None:
    current = jax.tree.map(jnp.multiply, self._parameters, self._scale)
    self._losses.append(self._judge(current))
    # `finished` stops the run then, and the best before stays the result.
    if not np.isfinite(self._losses[-1]):
      warnings.warn(
        f"{self._description}: loss {self._losses[-1]} after {self._taken} steps; "
        f"going back to step {self._best_step}",
        stacklevel=3,
      )
    elif self._losses[-1] < min(self._losses[:-1]):
      self._best, self._best_step = current, self._taken

  def _judge(self, dual_map: DualMap) -> float:
    sums = [float(_mean_kl(dual_map, s)) * s.size for s in self._held_out]
    return float(np.sum(sums) / sum(sample.size for sample in self._held_out))


def refine(
  dual_map: DualMap,
  pools: Sequence[Sample],
  held_out: Sequence[Sample],
  *,
  steps: int,
  **options: Any,
) -> Refined:
  """A `Refiner` run on samples that are all at hand; see there for the arguments."""
  refiner = Refiner(dual_map, pools, held_out, steps=steps, **options)
  refiner.run(pools, steps)
  return refiner.result


def mean_kl(dual_map: DualMap, sample: Sample) -> jax.Array:
  """KL(teacher || closed plan), mean over heads and valid rows; differentiable."""
  activation = sample.activation
  masks = activation.masks
  predicted = predict_dual(dual_map, activation.query, activation.key, *masks)
  closed = scaled_plan(
    activation.logits, predicted, dual_map.closures, *masks, **dual_map.steps
  ).duals
  of_rows = row_sums(masks[0], closed.f.shape[-1])
  gained = jnp.sum(closed.f * of_rows) + jnp.sum(closed.g * sample.columns)
  rows = zero_invalid(jnp.ones(activation.query.shape[:-1]), masks[0]).sum()
  return (sample.constant.sum() - gained) / rows


_mean_kl = jax.jit(mean_kl)


@functools.partial(jax.jit, static_argnames="transform")
def _step(parameters, state, scale, sample, transform):
  def loss(parameters):
    return mean_kl(jax.tree.map(jnp.multiply, parameters, scale), sample)

  updates, state = transform.update(jax.grad(loss)(parameters), state, parameters)
  return optax.apply_updates(parameters, updates), state


def _pairs(sample: Sample) -> int:
  _, heads, n, _ = sample.activation.query.shape
  return heads * n * sample.columns.shape[-1]


def _first(sample: Sample, count: int) -> Sample:
  return jax.tree.map(lambda leaf: leaf[:count], sample)


def _decayed(parameters: DualMap) -> DualMap:
  """Which parameters decay: the network's."""
  chosen = jax.tree.map(lambda _: False, parameters)
  if parameters.network is None:
    return chosen
  network = jax.tree.map(lambda _: True, parameters.network)
  network = dataclasses.replace(network, context_shift=False)
  return dataclasses.replace(chosen, network=network)
