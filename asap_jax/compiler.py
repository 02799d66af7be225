"""Compiling a model: every Sinkhorn attention becomes a dual map and a closure."""

import functools
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from asap_jax import slices as slicing
from asap_jax.calibrate import RidgeStatistics, add_batch, empty_statistics, solve_ridge
from asap_jax.dual_map import FEATURES, DualMap, dual_features, feature_count
from asap_jax.fidelity import (
  FidelitySums,
  Operator,
  fidelity_sums,
  operator_milliseconds,
)
from asap_jax.layers import AsapAttention
from asap_jax.report import LayerReport, Report
from asap_jax.sinkhorn import sinkhorn_source_dual
from asap_jax.surgery import Activation, Site, find_sinkhorn, recorder, replace_sites
from asap_jax.weights import centre

Directions = Literal["principal", "gaussian", "orthogonal", "quasi_monte_carlo"]
Calls = list[tuple[Activation, ...]]  # of each site
Stream = Generator[Calls, None, None]

# Every fifth batch, from the second on, is kept to measure on.
_HOLD_OUT_EVERY, _HOLD_OUT_FIRST = 5, 1


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
  directions: Directions = "principal",
  features: tuple[str, ...] = FEATURES,
  ridge: float = 1e-6,
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
      second on, is held out for the report. It is read up to three times; an iterator
      that can be read only once is stored in memory.
    slices: directions per head; sorting along them is what the operator costs.
    directions: how they are drawn; `"principal"` takes the leading directions of the
      calibration data, at the price of one more pass.
    features: kinds of features of the dual map (see `asap_jax.dual_map`).
    ridge: penalty relative to each feature's variance.
    call: how a batch is given to the model.
    seed: of random directions.
    progress: whether to show progress bars.

  Returns:
    `Compiled`: the compiled model and the report.

  Raises:
    ValueError: if the model holds no Sinkhorn attention or never calls one it holds,
      if there are too few batches or tokens, or if activations are not finite.
  """
  start = time.perf_counter()
  sites = find_sinkhorn(model)
  if not sites:
    raise ValueError(
      "model holds no Sinkhorn attention: expected a module with an attribute that is "
      "sinkhorn_attention or functools.partial(sinkhorn_attention, ...)"
    )
  if slices < 1:
    raise ValueError(f"slices={slices}: expected at least 1")
  if iter(batches) is batches:
    batches = list(batches)
  first = next(iter(batches), None)
  if first is None:
    raise ValueError("batches is empty: expected at least two batches")
  record = recorder(model, sites, call)
  head_shapes = [
    _head_shape(site, calls)
    for site, calls in zip(sites, jax.eval_shape(record, first), strict=True)
  ]

  def activations(held_out: bool, description: str) -> Stream:
    for index, batch in enumerate(track(batches, description, disable=not progress)):
      if (index % _HOLD_OUT_EVERY == _HOLD_OUT_FIRST) == held_out:
        calls = record(batch)
        _check_masks(sites, calls)
        yield calls

  if directions == "principal":
    _check_principal(head_shapes, slices)
    drawn = _principal_directions(activations(False, "Drawing directions"), slices)
  else:
    drawn = _random_directions(head_shapes, slices, directions, seed)
  fitted = _fit(sites, activations(False, "Calibrating"), drawn, features, ridge)
  layers = _measure(sites, activations(True, "Measuring"), fitted)
  replacements = [
    AsapAttention(layer.dual_map, site.options)
    for site, layer in zip(sites, fitted, strict=True)
  ]
  report = Report(
    layers=layers,
    slices=slices,
    batches=fitted[0].batches,
    tokens=fitted[0].tokens,
    seconds=time.perf_counter() - start,
  )
  return Compiled(replace_sites(model, sites, replacements), report)


class _FittedLayer(NamedTuple):
  dual_map: DualMap
  batches: int
  tokens: int
  seconds: float


def _head_shape(site: Site, calls: tuple[Activation, ...]) -> tuple[int, int]:
  """Heads and head dimension that a site is called with."""
  if not calls:
    raise ValueError(
      f"{site.name}: the model holds this attention but did not call it on a "
      "calibration batch; pass call=, or batches that reach it"
    )
  return calls[0].query.shape[1], calls[0].query.shape[-1]


def _check_masks(sites: list[Site], calls: Calls) -> None:
  for site, of_site in zip(sites, calls, strict=True):
    for activation in of_site:
      if activation.is_product is not None and not activation.is_product:
        raise ValueError(
          f"{site.name}: its mask is not the outer product of valid queries and valid "
          "keys, so its plan is not doubly stochastic; expected "
          "nnx.make_attention_mask(query_valid, key_valid)"
        )


def _check_principal(head_shapes: list[tuple[int, int]], slices: int) -> None:
  smallest = min(dim for _, dim in head_shapes)
  if slices > smallest:
    raise ValueError(
      f"slices={slices}: heads of dimension {smallest} have no more principal "
      "directions; pass directions='quasi_monte_carlo' for more slices"
    )


def _principal_directions(stream: Stream, slices: int) -> list[jax.Array]:
  total = None
  for calls in stream:
    batch = [sum(map(_second_moment, of_site)) for of_site in calls]
    total = batch if total is None else jax.tree.map(jnp.add, total, batch)
  return [slicing.principal(moment, slices) for moment in total]


def _random_directions(
  head_shapes: list[tuple[int, int]], slices: int, kind: Directions, seed: int
) -> list[jax.Array]:
  draw = {
    "gaussian": slicing.gaussian,
    "orthogonal": slicing.orthogonal,
    "quasi_monte_carlo": slicing.quasi_monte_carlo,
  }.get(kind)
  if draw is None:
    raise ValueError(
      f"directions={kind!r}: expected 'principal', 'gaussian', 'orthogonal' or "
      "'quasi_monte_carlo'"
    )
  keys = jax.random.split(jax.random.key(seed), len(head_shapes))
  return [
    draw(key, heads, slices, dim)
    for key, (heads, dim) in zip(keys, head_shapes, strict=True)
  ]


@jax.jit
def _second_moment(activation: Activation) -> jax.Array:
  """Sum of centred second moments of queries and keys, `[heads, dim, dim]`."""
  total = 0.0
  for points, mask in (
    (activation.query, activation.query_mask),
    (activation.key, activation.key_mask),
  ):
    centred = centre(points, mask, axis=-2)
    moment = jnp.einsum("bhnd,bhne->hde", centred, centred, precision="highest")
    total = (
      total
      + moment
      / jnp.maximum(jnp.trace(moment, axis1=-2, axis2=-1), 1e-30)[:, None, None]
    )
  return total


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
  sites: list[Site],
  stream: Stream,
  directions: list[jax.Array],
  features: tuple[str, ...],
  ridge: float,
) -> list[_FittedLayer]:
  sums: list[RidgeStatistics] = []
  for drawn in directions:
    heads, slices, dim = drawn.shape
    sums.append(empty_statistics(heads, feature_count(features, slices, dim)))
  seconds = [0.0] * len(sites)
  batches = 0
  for calls in stream:
    batches += 1
    for index, (site, of_site) in enumerate(zip(sites, calls, strict=True)):
      start = time.perf_counter()
      for activation in of_site:
        columns, target = _regression(
          activation, directions[index], site.iterations, features
        )
        try:
          sums[index] = add_batch(sums[index], columns, target, activation.query_mask)
        except ValueError as error:
          raise ValueError(f"{site.name}: {error}") from error
      seconds[index] += time.perf_counter() - start
  fitted = []
  for site, of_site, drawn, spent in zip(sites, sums, directions, seconds, strict=True):
    try:
      fit = solve_ridge(of_site, ridge)
    except ValueError as error:
      raise ValueError(f"{site.name}: {error}") from error
    dual_map = DualMap(drawn, jnp.asarray(fit.weights), features)
    fitted.append(_FittedLayer(dual_map, batches, int(of_site.count[0]), spent))
  return fitted


def _measure(
  sites: list[Site], stream: Stream, fitted: list[_FittedLayer]
) -> tuple[LayerReport, ...]:
  sums: list[FidelitySums | None] = [None] * len(sites)
  seconds = [layer.seconds for layer in fitted]
  milliseconds: list[list[float]] = [[] for _ in sites]
  for calls in stream:
    for index, (site, of_site) in enumerate(zip(sites, calls, strict=True)):
      start = time.perf_counter()
      operator = Operator("asap", dual_map=fitted[index].dual_map)
      for activation in of_site:
        new = fidelity_sums(activation, operator, site.iterations)
        sums[index] = new if sums[index] is None else sums[index] + new
      if not milliseconds[index]:
        teacher = Operator("sinkhorn", site.iterations)
        milliseconds[index] = operator_milliseconds(of_site[0], (teacher, operator))
      seconds[index] += time.perf_counter() - start
  if sums[0] is None:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to measure on"
    )
  return tuple(
    LayerReport(
      name=site.name,
      iterations=site.iterations,
      r2=1.0 - of_site.residual / np.where(of_site.power > 0, of_site.power, 1.0),
      tv=of_site.tv / of_site.rows,
      kl=of_site.kl / of_site.rows,
      column_error=of_site.column_error / of_site.columns,
      teacher_column_error=of_site.teacher_column_error / of_site.columns,
      teacher_milliseconds=times[0],
      milliseconds=times[1],
      seconds=spent,
    )
    for site, of_site, times, spent in zip(
      sites, sums, milliseconds, seconds, strict=True
    )
  )
