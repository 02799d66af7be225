"""Fitting the dual maps of all layers of a teacher: ridge regression, then descent."""

import functools
import itertools
import math
import time
from collections.abc import Collection, Iterator
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fitting.descent import Refiner
from asap_jax.compiler.fitting.objective import objective_sample
from asap_jax.compiler.fitting.ridge import (
  RidgeStatistics,
  add_batch,
  empty_statistics,
  solve_ridge,
)
from asap_jax.compiler.fitting.samples import Sample, host_bytes, pooled, sample_of
from asap_jax.compiler.fitting.scales import add_network
from asap_jax.compiler.fitting.slicing import DirectionKind, draw_directions
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recording import Layer, Observer
from asap_jax.dual_map.features import dual_features, feature_count
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import centre

# What refinement descends on: KL(teacher plan || compiled plan), or minus the dual
# objective of the converged problem.
Objective = Literal["plan", "dual"]

# Activations in memory at once during refinement; of those held out, a quarter.
_SAMPLE_BYTES = 2**30


class FitOptions(NamedTuple):
  """How dual maps are fitted; the arguments of `asap_jax.compile` of the same names."""

  slices: int
  closures: int
  directions: DirectionKind
  features: tuple[str, ...]
  hidden: int
  ridge: float
  refine_steps: int  # zero for none
  seed: int
  progress: bool
  objective: Objective = "plan"

  def check(self, dim: int) -> None:
    """Raises ValueError unless the options make sense for heads of dimension `dim`."""
    feature_count(self.features, self.slices, dim)
    for name, least in (("closures", 1), ("refine_steps", 0), ("hidden", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
    if self.hidden == 1:
      raise ValueError("hidden=1: expected at least two units, or 0 for none")
    if self.objective not in get_args(Objective):
      raise ValueError(f"objective={self.objective!r}: expected 'plan' or 'dual'")


class FittedLayer(NamedTuple):
  """A layer's dual map, what it was fitted on, and the seconds it took."""

  dual_map: DualMap
  batches: int
  tokens: int
  seconds: float


def fit_layers(
  teacher: Observer, options: FitOptions, chosen: Collection[int] | None = None
) -> list[FittedLayer]:
  """Dual maps of all layers; only `chosen` ones are refined, by default all.

  Raises:
    ValueError: if there are too few batches or tokens.
  """
  drawn = draw_directions(teacher, options.slices, options.directions, options.seed)
  fitted = _fit_ridge(teacher, drawn, options)
  fitted = [
    fit._replace(dual_map=fit.dual_map.with_closures(options.closures))
    for fit in fitted
  ]
  if not options.refine_steps:
    return fitted
  chosen = range(len(fitted)) if chosen is None else sorted(chosen)
  return _refine(teacher, fitted, options, list(chosen))


@functools.partial(jax.jit, static_argnames="features")
def _regression(
  activation: Activation,
  directions: jax.Array,
  teacher: Sinkhorn,
  features: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """Features and target of one call, as `ridge.add_batch` takes them."""
  masks = activation.query_mask, activation.key_mask
  dual = teacher.source(activation)
  columns = dual_features(
    activation.query, activation.key, directions, features, *masks
  )
  return columns, centre(dual, activation.query_mask)


def _fit_ridge(
  teacher: Observer, directions: list[jax.Array], options: FitOptions
) -> list[FittedLayer]:
  features = options.features
  sums: list[RidgeStatistics] = []
  for drawn in directions:
    heads, slices, dim = drawn.shape
    sums.append(empty_statistics(heads, feature_count(features, slices, dim)))
  layers = teacher.layers
  seconds = [0.0] * len(layers)
  batches = 0
  for calls in teacher.activations("Calibrating"):
    batches += 1
    for index, (layer, of_layer) in enumerate(zip(layers, calls, strict=True)):
      start = time.perf_counter()
      for activation in of_layer:
        columns, target = _regression(
          activation, directions[index], layer.site.teacher, features
        )
        try:
          sums[index] = add_batch(sums[index], columns, target, activation.query_mask)
        except ValueError as error:
          raise ValueError(f"{layer.name}: {error}") from error
      seconds[index] += time.perf_counter() - start
  fitted = []
  for layer, statistics, drawn, spent in zip(
    layers, sums, directions, seconds, strict=True
  ):
    try:
      weights = solve_ridge(statistics, options.ridge)
    except ValueError as error:
      raise ValueError(f"{layer.name}: {error}") from error
    dual_map = DualMap(drawn, jnp.asarray(weights), features)
    fitted.append(FittedLayer(dual_map, batches, int(statistics.count[0]), spent))
  return fitted


def _refine(
  teacher: Observer,
  fitted: list[FittedLayer],
  options: FitOptions,
  chosen: list[int],
) -> list[FittedLayer]:
  """Refines the chosen layers, in parts where not all activations fit into memory."""
  layers = [teacher.layers[index] for index in chosen]
  # Held-out samples come first and stay: every part is judged on them.
  held_out, _ = next(
    _parts(teacher, chosen, _SAMPLE_BYTES // 4, options.objective, held_out=True),
    ([], 0),
  )
  if not held_out:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to judge by"
    )
  refiners: list[Refiner] = []
  seconds = [0.0] * len(chosen)
  parts = _parts(teacher, chosen, _SAMPLE_BYTES, options.objective, held_out=False)
  for pools, batches in parts:
    # A part gets its share of the steps, so that all batches count alike.
    share = math.ceil(options.refine_steps * batches / fitted[0].batches)
    for place, index in enumerate(chosen):
      start = time.perf_counter()
      if len(refiners) <= place:
        dual_map = fitted[index].dual_map
        refiners.append(
          _refiner(layers[place], dual_map, pools[place], held_out[place], options)
        )
      refiners[place].run(pools[place], share)
      seconds[place] += time.perf_counter() - start
  refined = list(fitted)
  for index, refiner, spent in zip(chosen, refiners, seconds, strict=True):
    refined[index] = fitted[index]._replace(
      dual_map=refiner.result.dual_map, seconds=fitted[index].seconds + spent
    )
  return refined


def _refiner(
  layer: Layer,
  dual_map: DualMap,
  pools: list[Sample],
  held_out: list[Sample],
  options: FitOptions,
) -> Refiner:
  if options.hidden:
    first = jax.tree.map(lambda leaf: leaf[:256], pools[0])
    dual_map = add_network(
      dual_map, first, options.hidden, jax.random.key(options.seed)
    )
  return Refiner(
    dual_map,
    pools,
    held_out,
    steps=options.refine_steps,
    seed=options.seed,
    description=f"Refining {layer.name}",
    progress=options.progress,
  )


def _parts(
  teacher: Observer,
  chosen: list[int],
  size: int,
  objective: Objective,
  *,
  held_out: bool,
) -> Iterator[tuple[list[list[Sample]], int]]:
  """Pools of samples of each chosen layer, and their batches, some bytes at a time."""
  stream = teacher.activations("Recording", held_out=held_out)
  for first in stream:
    kept: list[list[Sample]] = [[] for _ in chosen]
    stored = batches = 0
    for calls in itertools.chain([first], stream):
      batches += 1
      for index, samples in zip(chosen, kept, strict=True):
        own = teacher.layers[index].site.teacher
        for activation in calls[index]:
          sample = (
            objective_sample(activation)
            if objective == "dual"
            else sample_of(activation, own)
          )
          samples.append(jax.device_get(sample))
          stored += host_bytes(samples[-1])
      # Whole batches only, so that a part can exceed its size by one of them.
      if stored > size:
        break
    yield [pooled(samples) for samples in kept], batches
