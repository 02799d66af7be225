"""Fitting the dual maps of all layers of a teacher: ridge regression, then descent."""

import functools
import itertools
import math
import time
from collections.abc import Iterator
from typing import NamedTuple

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
from asap_jax.compiler.fitting.slicing import draw_directions
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recipes import Objective, Recipe
from asap_jax.compiler.recorded import Recorded
from asap_jax.dual_map.features import dual_features, feature_count
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import centre, log_masses, valid

# Activations in memory at once during refinement; of those held out, a quarter.
_SAMPLE_BYTES = 2**30


class FittedLayer(NamedTuple):
  """A layer's dual map, what it was fitted on, and the seconds it took."""

  dual_map: DualMap
  batches: int
  tokens: int
  seconds: float


def fit_layers(teacher: Recorded, recipe: Recipe, seed: int = 0) -> list[FittedLayer]:
  """Dual maps of all layers, made by one recipe.

  Raises:
    ValueError: if there are too few batches or tokens.
  """
  drawn = draw_directions(teacher, recipe.slices, recipe.directions, seed)
  fitted = [
    fit._replace(dual_map=fit.dual_map.with_closures(recipe.closures))
    for fit in _fit_ridge(teacher, drawn, recipe)
  ]
  return _refine(teacher, fitted, recipe, seed) if recipe.refine_steps else fitted


@functools.partial(jax.jit, static_argnames="features")
def _regression(
  activation: Activation,
  directions: jax.Array,
  teacher: Sinkhorn,
  features: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """Features and target of one call, as `ridge.add_batch` takes them."""
  masks = activation.query_mask, activation.key_mask
  dual = teacher.source(activation) - log_masses(activation.query_mask)
  columns = dual_features(
    activation.query, activation.key, directions, features, *masks
  )
  return columns, centre(dual, activation.query_mask)


def _fit_ridge(
  teacher: Recorded, directions: list[jax.Array], recipe: Recipe
) -> list[FittedLayer]:
  features = recipe.features
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
          queries = valid(activation.query_mask)
          sums[index] = add_batch(sums[index], columns, target, queries)
        except ValueError as error:
          raise ValueError(f"{layer.name}: {error}") from error
      seconds[index] += time.perf_counter() - start
  fitted = []
  for layer, statistics, drawn, spent in zip(
    layers, sums, directions, seconds, strict=True
  ):
    try:
      weights = solve_ridge(statistics, recipe.ridge)
    except ValueError as error:
      raise ValueError(f"{layer.name}: {error}") from error
    dual_map = DualMap(drawn, jnp.asarray(weights), features)
    fitted.append(FittedLayer(dual_map, batches, int(statistics.count[0]), spent))
  return fitted


def _refine(
  teacher: Recorded, fitted: list[FittedLayer], recipe: Recipe, seed: int
) -> list[FittedLayer]:
  """Refines all layers, in parts where not all activations fit into memory."""
  # Held-out samples come first and stay: every part is judged on them.
  held_out, _ = next(
    _parts(teacher, _SAMPLE_BYTES // 4, recipe.objective, held_out=True), ([], 0)
  )
  if not held_out:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to judge by"
    )
  refiners: list[Refiner] = []
  seconds = [0.0] * len(fitted)
  parts = _parts(teacher, _SAMPLE_BYTES, recipe.objective, held_out=False)
  for pools, batches in parts:
    # A part gets its share of the steps, so that all batches count alike.
    share = math.ceil(recipe.refine_steps * batches / fitted[0].batches)
    for index, layer in enumerate(teacher.layers):
      start = time.perf_counter()
      if len(refiners) <= index:
        dual_map = fitted[index].dual_map
        if recipe.hidden:
          first = jax.tree.map(lambda leaf: leaf[:256], pools[index][0])
          rng = jax.random.key(seed)
          dual_map = add_network(dual_map, first, recipe.hidden, rng)
        refiners.append(
          Refiner(
            dual_map,
            pools[index],
            held_out[index],
            steps=recipe.refine_steps,
            seed=seed,
            description=f"Refining {layer.name}",
            progress=teacher.progress,
          )
        )
      refiners[index].run(pools[index], share)
      seconds[index] += time.perf_counter() - start
  return [
    fit._replace(dual_map=refiner.result.dual_map, seconds=fit.seconds + spent)
    for fit, refiner, spent in zip(fitted, refiners, seconds, strict=True)
  ]


def _parts(
  teacher: Recorded, size: int, objective: Objective, *, held_out: bool
) -> Iterator[tuple[list[list[Sample]], int]]:
  """Pools of samples of each layer, and their batches, some bytes at a time."""
  stream = teacher.activations("Recording", held_out=held_out)
  for first in stream:
    kept: list[list[Sample]] = [[] for _ in teacher.layers]
    stored = batches = 0
    for calls in itertools.chain([first], stream):
      batches += 1
      for layer, samples, of_layer in zip(teacher.layers, kept, calls, strict=True):
        for activation in of_layer:
          sample = (
            objective_sample(activation)
            if objective == "dual"
            else sample_of(activation, layer.site.teacher)
          )
          samples.append(jax.device_get(sample))
          stored += host_bytes(samples[-1])
      # Whole batches only, so that a part can exceed its size by one of them.
      if stored > size:
        break
    yield [pooled(samples) for samples in kept], batches
