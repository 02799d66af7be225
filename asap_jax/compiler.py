"""Compiling a model: every Sinkhorn attention becomes a dual map and a closure."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax.calibrate import RidgeStatistics, add_batch, empty_statistics, solve_ridge
from asap_jax.directions import DirectionKind, draw_directions
from asap_jax.dual_map import FEATURES, DualMap, dual_features, feature_count
from asap_jax.fidelity import (
  FidelitySums,
  Operator,
  fidelity_sums,
  operator_milliseconds,
)
from asap_jax.layers import AsapAttention
from asap_jax.observe import Layer, Observer
from asap_jax.refine import Sample, refine, sample_of
from asap_jax.report import LayerReport, Report
from asap_jax.sinkhorn import sinkhorn_source_dual
from asap_jax.surgery import Activation, Site, replace_sites
from asap_jax.weights import centre

# Activations that refinement keeps, of the batches fitted and of those held out.
_SAMPLE_BYTES = 2**30


class Compiled(NamedTuple):
  """Result of `compile`.

  Attributes:
    model: a copy of the teacher with an `AsapAttention` at every Sinkhorn site.
    report: its fidelity to the teacher.
  """

  model: nnx.Module
  report: Report


def compile(
  model: nnx.Module,
  batches: Iterable[Any],
  slices: int = 8,
  *,
  directions: DirectionKind = "principal",
  features: tuple[str, ...] = FEATURES,
  ridge: float = 1e-6,
  refine_steps: int = 0,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  seed: int = 0,
  progress: bool = True,
) -> Compiled:
  """Replaces every Sinkhorn attention of a trained model by a calibrated operator.

  Finds every `sinkhorn_attention`, runs the model on unlabelled batches, and fits each
  layer's dual map by ridge regression to the dual that the teacher's last iteration
  consumed (Tran, Milkert and Hyde, 2026, arXiv 2605.12879). Host code: it does not run
  under jit, vmap or grad; the compiled model does.

  Args:
    model: the teacher, any NNX model that holds `sinkhorn_attention` or a partial of it
      as an attribute of some module. It is left untouched.
    batches: inputs, without labels, in at least two batches; every fifth, from the
      second on, is held out for the report. They are iterated over several times; an
      iterator that can be read only once is stored in memory.
    slices: directions per head; sorting along them is what the operator costs.
    directions: how they are drawn; `"principal"` takes the leading directions of the
      calibration data, at the price of one more pass.
    features: kinds of features of the dual map (see `asap_jax.dual_map`).
    ridge: penalty relative to each feature's variance.
    refine_steps: steps per layer of descent on KL(teacher plan || compiled plan), over
      weights and directions, after the ridge fit (`asap_jax.refine`). A step takes one
      of the first batches, as many as fit into 1 GiB of recorded activations; the best
      parameters on held-out batches are kept. Off by default: it takes seconds to
      minutes a layer.
    call: how a batch is given to the model.
    seed: of random directions and of the order of refinement.
    progress: whether to show progress bars.

  Returns:
    `Compiled`: the compiled model and the report.

  Raises:
    ValueError: if the model holds no Sinkhorn attention or never calls one it holds,
      if there are too few batches or tokens, or if activations are not finite.
  """
  start = time.perf_counter()
  teacher = Observer(model, batches, call, progress)
  feature_count(features, slices, teacher.layers[0].dim)  # checks them
  drawn = draw_directions(teacher, slices, directions, seed)
  fitted = _fit(teacher, drawn, features, ridge)
  if refine_steps:
    fitted = _refine(teacher, fitted, refine_steps, seed, progress)
  report = Report(
    layers=_measure(teacher, fitted),
    slices=slices,
    batches=fitted[0].batches,
    tokens=fitted[0].tokens,
    seconds=time.perf_counter() - start,
  )
  replacements = [
    AsapAttention(_dual_map_of(site, teacher.layers, fitted), site.options)
    for site in teacher.sites
  ]
  return Compiled(replace_sites(model, teacher.sites, replacements), report)


class _FittedLayer(NamedTuple):
  dual_map: DualMap
  batches: int
  tokens: int
  seconds: float


def _dual_map_of(
  site: Site, layers: list[Layer], fitted: list[_FittedLayer]
) -> DualMap:
  """A site's dual map, stacked on a leading axis if a scan runs several layers."""
  held = [
    (layer, fit.dual_map)
    for layer, fit in zip(layers, fitted, strict=True)
    if layer.site is site
  ]
  if held[0][0].index is None:
    return held[0][1]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(fit for _, fit in held))


@functools.partial(jax.jit, static_argnames=("iterations", "features"))
def _regression(
  activation: Activation,
  directions: jax.Array,
  iterations: int,
  features: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
  """Features and target of one call, as `asap_jax.calibrate.add_batch` takes them."""
  masks = activation.query_mask, activation.key_mask
  dual = sinkhorn_source_dual(activation.logits, iterations, *masks)
  columns = dual_features(
    activation.query, activation.key, directions, features, *masks
  )
  return columns, centre(dual, activation.query_mask)


def _fit(
  teacher: Observer,
  directions: list[jax.Array],
  features: tuple[str, ...],
  ridge: float,
) -> list[_FittedLayer]:
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
          activation, directions[index], layer.site.iterations, features
        )
        try:
          sums[index] = add_batch(sums[index], columns, target, activation.query_mask)
        except ValueError as error:
          raise ValueError(f"{layer.name}: {error}") from error
      seconds[index] += time.perf_counter() - start
  fitted = []
  for layer, of_layer, drawn, spent in zip(
    layers, sums, directions, seconds, strict=True
  ):
    try:
      fit = solve_ridge(of_layer, ridge)
    except ValueError as error:
      raise ValueError(f"{layer.name}: {error}") from error
    dual_map = DualMap(drawn, jnp.asarray(fit.weights), features)
    fitted.append(_FittedLayer(dual_map, batches, int(of_layer.count[0]), spent))
  return fitted


def _refine(
  teacher: Observer, fitted: list[_FittedLayer], steps: int, seed: int, progress: bool
) -> list[_FittedLayer]:
  samples = _samples(teacher, held_out=False)
  held_out = _samples(teacher, held_out=True)
  refined = []
  for index, (layer, fit) in enumerate(zip(teacher.layers, fitted, strict=True)):
    start = time.perf_counter()
    result = refine(
      fit.dual_map,
      samples[index],
      held_out[index],
      steps=steps,
      seed=seed,
      description=f"Refining {layer.name}",
      progress=progress,
    )
    spent = fit.seconds + time.perf_counter() - start
    refined.append(fit._replace(dual_map=result.dual_map, seconds=spent))
  return refined


def _samples(teacher: Observer, *, held_out: bool) -> list[list[Sample]]:
  """Samples of each layer, in host memory, of the first batches that fit."""
  kept: list[list[Sample]] = [[] for _ in teacher.layers]
  size = 0
  for calls in teacher.activations("Recording", held_out=held_out):
    for layer, of_layer, samples in zip(teacher.layers, calls, kept, strict=True):
      for activation in of_layer:
        sample = sample_of(activation, layer.site.iterations)
        samples.append(jax.device_get(sample))
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(samples[-1]))
    if size > _SAMPLE_BYTES:
      break
  return kept


def _measure(teacher: Observer, fitted: list[_FittedLayer]) -> tuple[LayerReport, ...]:
  layers = teacher.layers
  sums: list[FidelitySums | None] = [None] * len(layers)
  seconds = [fit.seconds for fit in fitted]
  milliseconds: list[list[float]] = [[] for _ in layers]
  for calls in teacher.activations("Measuring", held_out=True):
    for index, (layer, of_layer) in enumerate(zip(layers, calls, strict=True)):
      start = time.perf_counter()
      operator = Operator("asap", dual_map=fitted[index].dual_map)
      for activation in of_layer:
        new = fidelity_sums(activation, operator, layer.site.iterations)
        sums[index] = new if sums[index] is None else sums[index] + new
      if not milliseconds[index]:
        original = Operator("sinkhorn", layer.site.iterations)
        milliseconds[index] = operator_milliseconds(of_layer[0], (original, operator))
      seconds[index] += time.perf_counter() - start
  if sums[0] is None:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to measure on"
    )
  return tuple(
    LayerReport(
      name=layer.name,
      iterations=layer.site.iterations,
      r2=1.0 - of_layer.residual / np.where(of_layer.power > 0, of_layer.power, 1.0),
      tv=of_layer.tv / of_layer.rows,
      kl=of_layer.kl / of_layer.rows,
      column_error=of_layer.column_error / of_layer.columns,
      teacher_column_error=of_layer.teacher_column_error / of_layer.columns,
      teacher_milliseconds=times[0],
      milliseconds=times[1],
      seconds=spent,
    )
    for layer, of_layer, times, spent in zip(
      layers, sums, milliseconds, seconds, strict=True
    )
  )
