"""Compiling a model: every Sinkhorn attention becomes the best operator there is."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from asap_jax.compiler import standing, watching
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.models import model_milliseconds
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recording import Observer
from asap_jax.compiler.records import keep_record, record_for
from asap_jax.compiler.report import Report, device_kind
from asap_jax.compiler.sites import Site, find_held, replace_held, replace_sites


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
  keep_candidates: bool = False,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  leave: Collection[str] = (),
  monitor: bool = False,
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
    model: the teacher, any NNX model whose modules hold `sinkhorn_attention` or a
      partial of it, as an attribute or in a dictionary, list or tuple (docs/models.md).
      It is left untouched and runs in evaluation mode; the compiled model is in the
      teacher's. A warning and the report name Sinkhorn attention that it calls but
      holds elsewhere: that stays.
    batches: inputs, in at least two batches, as the model will be given them: the times
      that decide are those of their shapes. Every fifth, from the second on, is held
      out. Some hundred sequences are read for a choice, once, so that there may be
      batches without end. A recipe reads all of them several times, in the same order;
      what an iterator gives that can be read only once is stored in memory.
    operator: `None` for the best by measurement; a `Recipe`, or
      `asap_jax.compiler.Sinkhorn`, for this one in every layer.
    target_tv: total variation to the teacher's plans, mean over heads and rows, that is
      close enough for a choice by measurement; single heads may be farther, as the
      report shows.
    keep_candidates: whether the model is to run elsewhere: what is the fastest here
      need not be so there. Then one map of each family is fitted that comes close
      enough, however slow it is here, which takes minutes, and every layer holds all
      operators that may stand in it (`asap_jax.compiler.CandidateAttention`); once
      loaded on the device that is meant, `asap_jax.choose` leaves the fastest there.
    call: how a batch is given to the model, such as `lambda model, batch:
      model(batch["tokens"])`; batches hold arrays alone.
    leave: names of layers, as in the report, that stay as they are.
    monitor: whether the compiled model is watched from here on: see `asap_jax.monitor`,
      which is given the batches that were held out.
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
  standing.check_wanted(operator, target_tv)
  if keep_candidates and operator is not None:
    raise ValueError(
      f"keep_candidates=True with operator={operator!r}: expected operator=None, which "
      "leaves something to choose"
    )
  teacher = Observer(model, batches, call, progress, leave)
  if keep_candidates:
    _check_keepable(teacher.sites)
  made = standing.wanted(teacher, operator, target_tv, seed, every=keep_candidates)
  target = target_tv if operator is None else None
  found = _compiled(model, teacher, made, call, target, start, keep_candidates)
  if not monitor:
    return found
  watched = watching.monitor(found.model, teacher.held_out_batches, call=call)
  return found._replace(model=watched)


def choose(
  model: nnx.Module,
  batches: Iterable[Any],
  *,
  target_tv: float | None = None,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  progress: bool = True,
) -> Compiled:
  """Leaves the fastest operator on this device of those that a compiled model holds.

  Nothing is fitted: the candidates that `asap_jax.compile(..., keep_candidates=True)`
  found close enough are timed in turn, with all iterations in their fastest exact form.
  Host code: it does not run under jit, vmap or grad; the model does.

  Args:
    model: compiled so, on whatever device; left untouched.
    batches: as for `asap_jax.compile`: at least two, as the model will be given them.
    target_tv: to be closer to the teacher's plans than the model was compiled for.
    call: how a batch is given to the model.
    progress: whether to show progress bars.

  Returns:
    `Compiled`: a model with one operator in every layer, and the report of this device.

  Raises:
    ValueError: if the model holds no candidates, and as `asap_jax.compile`.

  Example:
    >>> import jax, asap_jax
    >>> teacher = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=3,
    ...   rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 6, 8))
    >>> compiled, _ = asap_jax.compile(teacher, batches, target_tv=0.0,
    ...   keep_candidates=True, progress=False)
    >>> sorted(compiled.attention_fn.operators)
    ['sinkhorn@3', 'teacher']
    >>> _, report = asap_jax.choose(compiled, batches, progress=False)
    >>> report.layers[0].chosen in ("teacher", "sinkhorn@3")
    True
  """
  start = time.perf_counter()
  kept = find_held(model, CandidateAttention)
  if not kept:
    raise ValueError(
      "model holds no candidates: expected one that asap_jax.compile returned with "
      "keep_candidates=True"
    )
  trained = replace_held(
    model, {where: held.teacher_function for where, held in kept.items()}
  )
  teacher = Observer(trained, batches, call, progress)
  target = 1.0 if target_tv is None else target_tv
  by_site = {
    site.name: kept[site.path, site.attribute]
    for site in teacher.sites
    if (site.path, site.attribute) in kept
  }
  made = standing.best_of(teacher, by_site, target)
  return _compiled(trained, teacher, made, call, target_tv, start)


def _check_keepable(sites: Sequence[Site]) -> None:
  for site in sites:
    arrays = [
      name
      for name, value in site.options.items()
      if isinstance(value, jax.Array | np.ndarray)
    ]
    if arrays:
      raise ValueError(
        f"{site.name} binds arrays ({', '.join(arrays)}), which candidates cannot "
        "keep: expected keep_candidates=False, or arrays that are passed in the call"
      )


def _compiled(
  model: nnx.Module,
  teacher: Observer,
  made: Sequence[standing.Standing],
  call: Callable[[nnx.Module, Any], Any],
  target_tv: float | None,
  start: float,
  keep_candidates: bool = False,
) -> Compiled:
  functions = [
    standing.attention_at(site, teacher.layers, made, keep_candidates=keep_candidates)
    for site in teacher.sites
  ]
  reports = tuple(map(standing.report_of, teacher.layers, made))
  for site, function in zip(teacher.sites, functions, strict=True):
    own = [
      report
      for layer, report in zip(teacher.layers, reports, strict=True)
      if layer.site is site
    ]
    record = record_for(site.teacher, own, device_kind(), target_tv, teacher.sequences)
    keep_record(function, record)
  compiled = replace_sites(model, teacher.sites, functions)
  report = Report(
    layers=reports,
    model_milliseconds=model_milliseconds(
      model, teacher.sites, compiled, teacher.first, call
    ),
    target_tv=target_tv,
    seconds=time.perf_counter() - start,
    unreplaced=teacher.unreplaced,
  )
  return Compiled(compiled, report)
