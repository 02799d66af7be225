"""Compiling a model: every Sinkhorn attention becomes the best operator there is."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import track

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.fidelity import FidelitySums, fidelity_sums
from asap_jax.compiler.fitting.stages import FittedLayer, fit_layers
from asap_jax.compiler.measuring import cuts, measure
from asap_jax.compiler.models import model_milliseconds
from asap_jax.compiler.operators import Asap, Operator, Sinkhorn
from asap_jax.compiler.prepared import SEQUENCES, PreparedLayer
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recording import Layer, Observer
from asap_jax.compiler.report import TEACHER, Alternative, LayerReport, Report
from asap_jax.compiler.selection import Selection, select
from asap_jax.compiler.sites import Site, replace_sites


class Compiled(NamedTuple):
  """Result of `compile`.

  Attributes:
    model: a copy of the teacher with another operator at every Sinkhorn site.
    report: what that gains, and its fidelity to the teacher.
  """

  model: nnx.Module
  report: Report


def compile(
  model: nnx.Module,
  batches: Iterable[Any],
  operator: Recipe | Sinkhorn | None = None,
  *,
  target_tv: float = 0.05,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  seed: int = 0,
  progress: bool = True,
) -> Compiled:
  """Replaces every Sinkhorn attention of a trained model by the best operator here.

  Finds every `sinkhorn_attention` and runs the model on unlabelled batches. Each layer
  gets the operator that is the fastest on this device of those whose plans come within
  `target_tv` of the teacher's on held-out batches: half a closure or a few after a
  linear dual map, which is fitted in seconds; a map with slices or a network; a
  Gaussian start; Sinkhorn cut short; or all iterations in their fastest exact form,
  which is also what stays where nothing else is close enough. Whatever is returned, no
  operator that was measured is both as fast and as close, or better in one and equal in
  the other.

  Or every layer gets one fixed operator: the paper's, or any other `Recipe`. Then a
  dual map is fitted by ridge regression to the dual that the teacher's last iteration
  consumed (Tran, Milkert and Hyde, 2026, arXiv 2605.12879), then by descent on
  KL(teacher plan || compiled plan) over all its parameters, directions included
  (`asap_jax.compiler.fitting.descent`). Host code: it does not run under jit, vmap or
  grad; the compiled model does.

  Args:
    model: the teacher, any NNX model that holds `sinkhorn_attention` or a partial of it
      as an attribute of some module. It is left untouched.
    batches: inputs, without labels, in at least two batches, as the model will be given
      them: the times that decide are those of their shapes. Every fifth, from the
      second on, is held out. Some hundred sequences are read for a choice, all of them
      for a recipe, several times; an iterator that can be read only once is stored in
      memory.
    operator: `None` for the best by measurement; a `Recipe`, or
      `asap_jax.compiler.Sinkhorn`, for this one in every layer.
    target_tv: total variation to the teacher's plans, mean over heads and rows, that is
      close enough for a choice by measurement.
    call: how a batch is given to the model.
    seed: of random directions, of networks and of the order of refinement.
    progress: whether to show progress bars.

  Returns:
    `Compiled`: the compiled model and the report.

  Raises:
    ValueError: if the model holds no Sinkhorn attention or never calls one it holds,
      if there are too few batches or tokens, if activations are not finite, or if an
      option makes no sense.

  Example:
    >>> import asap_jax
    >>> teacher = asap_jax.SinkhornMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 6, 8))
    >>> plain = asap_jax.Recipe(slices=2, refine_steps=0)
    >>> compiled, report = asap_jax.compile(teacher, batches, plain, progress=False)
    >>> compiled(batches[0]).shape, report.layers[0].tv.shape
    ((4, 6, 8), (2,))
  """
  start = time.perf_counter()
  if not isinstance(operator, Recipe | Sinkhorn | None):
    raise ValueError(
      f"operator={operator!r}: expected an asap_jax.Recipe, an "
      "asap_jax.compiler.Sinkhorn or None"
    )
  if not target_tv >= 0:
    raise ValueError(f"target_tv={target_tv}: expected a number from 0 to 1")
  teacher = Observer(model, batches, call, progress)
  made = (
    _best(teacher, target_tv, seed)
    if operator is None
    else _fixed(teacher, operator, seed)
  )
  replacements = [_function(site, teacher.layers, made) for site in teacher.sites]
  compiled = replace_sites(model, teacher.sites, replacements)
  report = Report(
    layers=tuple(
      _layer_report(layer, of_layer)
      for layer, of_layer in zip(teacher.layers, made, strict=True)
    ),
    model_milliseconds=model_milliseconds(
      model, teacher.sites, compiled, next(iter(teacher.batches)), call
    ),
    target_tv=target_tv if operator is None else None,
    seconds=time.perf_counter() - start,
  )
  return Compiled(compiled, report)


class _Made(NamedTuple):
  """What is to stand in a layer, and what was measured there.

  Attributes:
    operator: as chosen.
    label: of it.
    sums: its fidelity.
    alternatives: all that was measured, by label.
    teacher_milliseconds: of the teacher as trained.
    seconds: spent on this layer alone.
  """

  operator: Operator
  label: str
  sums: FidelitySums
  alternatives: tuple[Alternative, ...]
  teacher_milliseconds: float
  seconds: float

  @property
  def milliseconds(self) -> float:
    """Of the chosen operator."""
    (found,) = (a.milliseconds for a in self.alternatives if a.label == self.label)
    return found


def _best(teacher: Observer, target_tv: float, seed: int) -> list[_Made]:
  """The best operators by measurement, of every layer."""
  calls, held_out = teacher.sample(SEQUENCES)
  layers = [
    PreparedLayer(
      layer,
      [each for of_batch in calls for each in of_batch[index]],
      [each for of_batch in held_out for each in of_batch[index]],
      seed,
    )
    for index, layer in enumerate(teacher.layers)
  ]
  made = []
  for site in track(teacher.sites, "Choosing", disable=not teacher.progress):
    start = time.perf_counter()
    own = [layer for layer in layers if layer.layer.site is site]
    selection = select(own, target_tv)
    seconds = (time.perf_counter() - start) / len(own)
    made += [
      _selected(layer, selection, place, seconds) for place, layer in enumerate(own)
    ]
  return made


def _selected(
  layer: PreparedLayer, selection: Selection, place: int, seconds: float
) -> _Made:
  chosen = selection.measured[selection.chosen]
  operator, teacher = chosen.operators[place], layer.layer.site.teacher
  sums = [fidelity_sums(call, [operator], teacher)[0] for call in layer.held_out]
  alternatives = tuple(
    Alternative(label, each.tvs[place], each.milliseconds[place])
    for label, each in selection.measured.items()
  )
  return _Made(
    operator,
    selection.chosen,
    functools.reduce(lambda a, b: a + b, sums),
    alternatives,
    selection.measured[TEACHER].milliseconds[place],
    seconds,
  )


def _fixed(teacher: Observer, operator: Recipe | Sinkhorn, seed: int) -> list[_Made]:
  """One operator in every layer, compared with Sinkhorn cut short."""
  fitted: list[FittedLayer] = []
  wanted: list[Operator]
  if isinstance(operator, Recipe):
    operator.check(teacher.layers[0].dim)
    fitted = fit_layers(teacher, operator, seed)
    wanted = [Asap(fit.dual_map) for fit in fitted]
  else:
    wanted = [operator] * len(teacher.layers)
  compared: list[Sequence[Operator]] = [
    [own, *(cut for cut in cuts(layer.site.teacher) if cut != own)]
    for own, layer in zip(wanted, teacher.layers, strict=True)
  ]
  made = []
  for index, (before, chosen, *others) in enumerate(measure(teacher, compared)):
    alternatives = tuple(each.alternative for each in (chosen, *others, before))
    made.append(
      _Made(
        chosen.operator,
        chosen.label,
        chosen.sums,
        alternatives,
        before.milliseconds,
        fitted[index].seconds if fitted else 0.0,
      )
    )
  return made


def _function(
  site: Site, layers: Sequence[Layer], made: Sequence[_Made]
) -> Callable[..., jax.Array]:
  """What stands at a site, its dual maps stacked if a scan runs several layers."""
  held = [
    (layer, of_layer)
    for layer, of_layer in zip(layers, made, strict=True)
    if layer.site is site
  ]
  layer, (operator, label, *_) = held[0]
  if label == TEACHER:
    return site.function
  if not isinstance(operator, Asap):
    return functools.partial(operator.attention_fn, **site.options)
  maps = [each.operator.dual_map for _, each in held if isinstance(each.operator, Asap)]
  if layer.index is None:
    return AsapAttention(maps[0], site.options)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
  return AsapAttention(stacked, site.options)


def _layer_report(layer: Layer, made: _Made) -> LayerReport:
  sums = made.sums
  predicted = 1.0 - sums.residual / np.where(sums.power > 0, sums.power, 1.0)
  query_side = (
    isinstance(made.operator, Asap) and made.operator.dual_map.side == "query"
  )
  return LayerReport(
    name=layer.name,
    iterations=layer.site.iterations,
    r2=predicted if query_side else np.full_like(sums.tv, np.nan),
    tv=sums.tv / sums.rows,
    kl=sums.kl / sums.rows,
    column_error=sums.column_error / sums.columns,
    teacher_column_error=sums.teacher_column_error / sums.columns,
    teacher_milliseconds=made.teacher_milliseconds,
    milliseconds=made.milliseconds,
    seconds=made.seconds,
    alternatives=made.alternatives,
    chosen=made.label,
  )
