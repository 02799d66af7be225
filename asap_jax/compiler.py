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
  layers, head_shapes = _layers(sites, _shapes_seen(record, first))

  def activations(held_out: bool, description: str) -> Stream:
    for index, batch in enumerate(track(batches, description, disable=not progress)):
      if (index % _HOLD_OUT_EVERY == _HOLD_OUT_FIRST) == held_out:
        calls = _unstack(record(batch))
        _check_calls(layers, calls)
        yield calls

  if directions == "principal":
    _check_principal(head_shapes, slices)
    drawn = _principal_directions(activations(False, "Drawing directions"), slices)
  else:
    drawn = _random_directions(head_shapes, slices, directions, seed)
  fitted = _fit(layers, activations(False, "Calibrating"), drawn, features, ridge)
  report = Report(
    layers=_measure(layers, activations(True, "Measuring"), fitted),
    slices=slices,
    batches=fitted[0].batches,
    tokens=fitted[0].tokens,
    seconds=time.perf_counter() - start,
  )
  replacements = [
    AsapAttention(_restack(layers, fitted, site), site.options) for site in sites
  ]
  return Compiled(replace_sites(model, sites, replacements), report)


class _Layer(NamedTuple):
  """A site, or one of the layers that `nnx.scan` runs through it."""

  site: Site
  index: int | None

  @property
  def name(self) -> str:
    return self.site.name + ("" if self.index is None else f"[{self.index}]")

  @property
  def iterations(self) -> int:
    return self.site.iterations


class _FittedLayer(NamedTuple):
  dual_map: DualMap
  batches: int
  tokens: int
  seconds: float


def _shapes_seen(record: Callable[[Any], Calls], batch: Any) -> Calls:
  try:
    return jax.eval_shape(record, batch)
  except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
    raise ValueError(
      "the model could not be run with its Sinkhorn attention under observation: "
      f"{error}. If it runs without (try call(model, batch)), the attention sits in a "
      "transformation that shares it, such as nnx.vmap with its axis None; nnx.jit, "
      "nnx.remat and nnx.scan over stacked layers can be compiled"
    ) from error


def _layers(
  sites: list[Site], seen: Calls
) -> tuple[list[_Layer], list[tuple[int, int]]]:
  """The layers behind the sites, with the heads and head dimension of each."""
  layers, shapes = [], []
  for site, calls in zip(sites, seen, strict=True):
    if not calls:
      raise ValueError(
        f"{site.name}: no call of this attention was seen on a calibration batch; pass "
        "call=, or batches that reach it; a model that splits and merges its modules "
        "inside a JAX transformation hides the calls"
      )
    *stack, _, heads, _, dim = calls[0].query.shape
    if len(stack) > 1:
      raise ValueError(
        f"{site.name}: stacked in {len(stack)} nested scans: expected one at most"
      )
    indices = range(stack[0]) if stack else [None]
    layers += [_Layer(site, index) for index in indices]
    shapes += [(heads, dim)] * len(indices)
  return layers, shapes


def _unstack(calls: Calls) -> Calls:
  """Calls of each layer; `nnx.scan` stacks those of its layers on a leading axis."""
  unstacked = []
  for of_site in calls:
    if of_site[0].query.ndim == 4:
      unstacked.append(of_site)
      continue
    unstacked += [
      tuple(jax.tree.map(lambda leaf: leaf[index], call) for call in of_site)  # noqa: B023
      for index in range(len(of_site[0].query))
    ]
  return unstacked


def _restack(layers: list[_Layer], fitted: list["_FittedLayer"], site: Site) -> DualMap:
  maps = [
    of_layer.dual_map
    for layer, of_layer in zip(layers, fitted, strict=True)
    if layer.site is site
  ]
  stacked = any(layer.site is site and layer.index is not None for layer in layers)
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps) if stacked else maps[0]


def _check_calls(layers: list[_Layer], calls: Calls) -> None:
  for layer, of_layer in zip(layers, calls, strict=True):
    for activation in of_layer:
      if not _is_finite(activation):
        raise ValueError(
          f"{layer.name}: queries, keys or bias are not finite on a calibration batch: "
          "the teacher overflows there"
        )
      if activation.is_product is not None and not activation.is_product:
        raise ValueError(
          f"{layer.name}: its mask is not the outer product of valid queries and valid "
          "keys, so its plan is not doubly stochastic; expected "
          "nnx.make_attention_mask(query_valid, key_valid)"
        )


@jax.jit
def _is_finite(activation: Activation) -> jax.Array:
  parts = (activation.query, activation.key, activation.bias)
  return jnp.array(
    [jnp.isfinite(part).all() for part in parts if part is not None]
  ).all()


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
  layers: list[_Layer],
  stream: Stream,
  directions: list[jax.Array],
  features: tuple[str, ...],
  ridge: float,
) -> list[_FittedLayer]:
  sums: list[RidgeStatistics] = []
  for drawn in directions:
    heads, slices, dim = drawn.shape
    sums.append(empty_statistics(heads, feature_count(features, slices, dim)))
  seconds = [0.0] * len(layers)
  batches = 0
  for calls in stream:
    batches += 1
    for index, (layer, of_layer) in enumerate(zip(layers, calls, strict=True)):
      start = time.perf_counter()
      for activation in of_layer:
        columns, target = _regression(
          activation, directions[index], layer.iterations, features
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


def _measure(
  layers: list[_Layer], stream: Stream, fitted: list[_FittedLayer]
) -> tuple[LayerReport, ...]:
  sums: list[FidelitySums | None] = [None] * len(layers)
  seconds = [fit.seconds for fit in fitted]
  milliseconds: list[list[float]] = [[] for _ in layers]
  for calls in stream:
    for index, (layer, of_layer) in enumerate(zip(layers, calls, strict=True)):
      start = time.perf_counter()
      operator = Operator("asap", dual_map=fitted[index].dual_map)
      for activation in of_layer:
        new = fidelity_sums(activation, operator, layer.iterations)
        sums[index] = new if sums[index] is None else sums[index] + new
      if not milliseconds[index]:
        teacher = Operator("sinkhorn", layer.iterations)
        milliseconds[index] = operator_milliseconds(of_layer[0], (teacher, operator))
      seconds[index] += time.perf_counter() - start
  if sums[0] is None:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to measure on"
    )
  return tuple(
    LayerReport(
      name=layer.name,
      iterations=layer.iterations,
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
