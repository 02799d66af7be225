"""Compiling a model: every Sinkhorn attention becomes a dual map and a closure."""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.fitting.slicing import DirectionKind
from asap_jax.compiler.fitting.stages import FitOptions, Objective, fit_layers
from asap_jax.compiler.measuring import Measured, cuts, measure
from asap_jax.compiler.operators import Asap, Operator
from asap_jax.compiler.recording import Layer, Observer
from asap_jax.compiler.report import LayerReport, Report
from asap_jax.compiler.selection import select
from asap_jax.compiler.sites import Site, replace_sites
from asap_jax.dual_map.features import COMPILED


class Compiled(NamedTuple):
  """Result of `compile`.

  Attributes:
    model: a copy of the teacher with an `AsapAttention` at every Sinkhorn site (or
      what was chosen for it by `target_tv`).
    report: its fidelity to the teacher.
  """

  model: nnx.Module
  report: Report


def compile(
  model: nnx.Module,
  batches: Iterable[Any],
  slices: int = 8,
  *,
  closures: int = 1,
  directions: DirectionKind = "principal",
  features: tuple[str, ...] = COMPILED,
  hidden: int = 64,
  ridge: float = 1e-6,
  refine_steps: int = 3000,
  objective: Objective = "plan",
  target_tv: float | None = None,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  seed: int = 0,
  progress: bool = True,
) -> Compiled:
  """Replaces every Sinkhorn attention of a trained model by a calibrated operator.

  Finds every `sinkhorn_attention`, runs the model on unlabelled batches, and fits each
  layer's dual map by ridge regression to the dual that the teacher's last iteration
  consumed (Tran, Milkert and Hyde, 2026, arXiv 2605.12879), then by descent on
  KL(teacher plan || compiled plan) over all its parameters, directions included
  (`asap_jax.compiler.fitting.descent`). Host code: it does not run under jit, vmap or
  grad; the compiled model does.

  Args:
    model: the teacher, any NNX model that holds `sinkhorn_attention` or a partial of it
      as an attribute of some module. It is left untouched.
    batches: inputs, without labels, in at least two batches; every fifth, from the
      second on, is held out to stop by and for the report. They are iterated over
      several times; an iterator that can be read only once is stored in memory.
    slices: directions per head; sorting along them is most of what the map costs.
    closures: two-sided closures after the prediction; between them the dual is
      over-relaxed by a factor learned for each head.
    directions: how they are drawn at first; `"principal"` takes the leading directions
      of the calibration data, at the price of one more pass.
    features: kinds of features of the dual map (see `asap_jax.dual_map.features`).
    hidden: units of the network that adds to the linear map
      (`asap_jax.dual_map.network`); zero keeps the map linear, as it is without
      refinement.
    ridge: penalty relative to each feature's variance.
    refine_steps: steps of up to 32 sequences per layer; more give a closer plan. What
      is best on held-out batches is kept, so it never ends worse there than it started.
      Activations are kept in memory up to 1 GiB, and read in parts beyond. Zero keeps
      the ridge fit: the paper's plain form (with `directions="gaussian"` and
      `features=("potentials",)`), and RA-OT where the teacher's iterations converge
      (see `objective`).
    objective: what refinement descends on. `"plan"` is KL(teacher plan || compiled
      plan). `"dual"` is minus the entropic dual objective of the compiled duals, which
      is that KL to the *converged* plan up to a constant (OA-OT, "Amortized Optimal
      Transport from Sliced Potentials", 2026, arXiv 2604.15114): it asks nothing of the
      teacher's iterations, and is the wrong aim where they are far from converged. With
      `features=("query",)` too, it is our form of Meta OT (Amos et al., 2022, arXiv
      2206.05262): a network that sees no slices
      (`asap_jax.compiler.fitting.objective`).
    target_tv: total variation to the teacher's plan that is close enough. If given,
      each layer gets the operator that reaches it on held-out batches and is fastest
      on this device: a dual map with or without sorting and with one closure or more,
      or Sinkhorn cut short. Where none does, the teacher's attention stays, with all
      its iterations in whichever implementation is faster, and a warning says so.
      `slices` is then an upper bound.
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
    >>> compiled, report = asap_jax.compile(
    ...   teacher, batches, slices=2, refine_steps=0, progress=False)
    >>> compiled(batches[0]).shape, report.layers[0].tv.shape
    ((4, 6, 8), (2,))
  """
  start = time.perf_counter()
  if target_tv is not None and not target_tv >= 0:
    raise ValueError(f"target_tv={target_tv}: expected a number from 0 to 1, or None")
  teacher = Observer(model, batches, call, progress)
  options = FitOptions(
    slices=slices,
    closures=closures,
    directions=directions,
    features=features,
    hidden=hidden,
    ridge=ridge,
    refine_steps=refine_steps,
    seed=seed,
    progress=progress,
    objective=objective,
  )
  options.check(teacher.layers[0].dim)
  if target_tv is None:
    fitted = fit_layers(teacher, options)
    operators: list[list[Operator]] = [
      [Asap(fit.dual_map), *cuts(layer.site.teacher)]
      for fit, layer in zip(fitted, teacher.layers, strict=True)
    ]
    measured = measure(teacher, operators)
    chosen = [of_layer[1] for of_layer in measured]
  else:
    measured, chosen, fitted = select(teacher, options, target_tv)
  replacements = [_function(site, teacher.layers, chosen) for site in teacher.sites]
  compiled = replace_sites(model, teacher.sites, replacements)
  report = Report(
    layers=tuple(
      _layer_report(layer, of_layer, stands, fitted[index].seconds if fitted else 0.0)
      for index, (layer, of_layer, stands) in enumerate(
        zip(teacher.layers, measured, chosen, strict=True)
      )
    ),
    slices=slices,
    batches=fitted[0].batches if fitted else 0,
    tokens=fitted[0].tokens if fitted else 0,
    seconds=time.perf_counter() - start,
  )
  return Compiled(compiled, report)


def _function(
  site: Site, layers: list[Layer], chosen: list[Measured]
) -> Callable[..., jax.Array]:
  """What stands at a site, its dual maps stacked if a scan runs several layers."""
  held = [
    (layer, measured.operator)
    for layer, measured in zip(layers, chosen, strict=True)
    if layer.site is site
  ]
  (layer, operator), *_ = held
  if operator.label == "teacher":
    return site.function
  if not isinstance(operator, Asap):
    return functools.partial(operator.attention_fn, **site.options)
  maps = [own.dual_map for _, own in held if isinstance(own, Asap)]
  if layer.index is None:
    return AsapAttention(maps[0], site.options)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
  return AsapAttention(stacked, site.options)


def _layer_report(
  layer: Layer, measured: list[Measured], chosen: Measured, seconds: float
) -> LayerReport:
  sums, teacher = chosen.sums, measured[0]
  predicted = 1.0 - sums.residual / np.where(sums.power > 0, sums.power, 1.0)
  return LayerReport(
    name=layer.name,
    iterations=layer.site.iterations,
    r2=predicted
    if isinstance(chosen.operator, Asap)
    else np.full_like(sums.tv, np.nan),
    tv=sums.tv / sums.rows,
    kl=sums.kl / sums.rows,
    column_error=sums.column_error / sums.columns,
    teacher_column_error=sums.teacher_column_error / sums.columns,
    teacher_milliseconds=teacher.milliseconds,
    milliseconds=chosen.milliseconds,
    seconds=seconds,
    # What stands comes first: several dual maps may share its label.
    alternatives=tuple(
      each.alternative
      for each in sorted(measured[1:], key=lambda each: each is not chosen)
    ),
    chosen=chosen.label,
  )
