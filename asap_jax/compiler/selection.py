"""Choosing each layer's operator by measurement: the fastest that is close enough."""

import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from asap_jax.compiler.fidelity import operator_milliseconds
from asap_jax.compiler.fitting.stages import FitOptions, FittedLayer, fit_layers
from asap_jax.compiler.measuring import Measured, cuts, measure
from asap_jax.compiler.operators import Asap
from asap_jax.compiler.recording import Layer, Observer
from asap_jax.dual_map.features import feature_count
from asap_jax.dual_map.network import init_network
from asap_jax.dual_map.predict import DualMap
from asap_jax.potentials.directions import gaussian


class Choice:
  """What was measured on one attention site, and the fastest that reaches the target.

  Layers that a scan runs through one site share their operator: it must be close enough
  in all of them, and its time is the sum of theirs.
  """

  def __init__(self, target_tv: float):
    self._target = target_tv
    self.measured: list[list[Measured]] = []  # of each operator, of each layer

  @property
  def best(self) -> list[Measured] | None:
    """The fastest that reaches the target, or `None`."""
    good = [each for each in self.measured if max(m.tv for m in each) <= self._target]
    return min(good, key=_milliseconds, default=None)

  def could_win(self, milliseconds: float) -> bool:
    """Whether an operator as fast as this would be chosen, if only it were close."""
    best = self.best
    return best is None or milliseconds < _milliseconds(best)


def select(
  teacher: Observer, options: FitOptions, target_tv: float
) -> tuple[list[list[Measured]], list[Measured], list[FittedLayer]]:
  """The fastest operator of each site whose TV is at most `target_tv`.

  Candidates are Sinkhorn cut short, and dual maps without a sort, on a quarter of the
  slices and on all, followed by one or two closures (or as many as `options` say); and
  linear maps without a sort, which cost next to nothing, followed by up to five. The
  time of a map does not depend on its parameters, so a map is fitted only where it
  would be faster than the best so far.

  Returns:
    For each layer all that was measured, the teacher first; what was chosen; and the
    last fit, if there was one.
  """
  layers = teacher.layers
  members = [
    [i for i, layer in enumerate(layers) if layer.site is site]
    for site in teacher.sites
  ]
  choices = [Choice(target_tv) for _ in members]
  of_cuts = measure(teacher, [cuts(layer.site.teacher) for layer in layers])
  for choice, of_site in zip(choices, members, strict=True):
    # Behind the teacher and before its uncut form stand those that stop earlier.
    choice.measured = [
      list(each) for each in zip(*(of_cuts[i][1:-1] for i in of_site), strict=True)
    ]
  candidates = list(_candidates(options))
  times = _untrained_milliseconds(teacher, candidates)
  fits: list[FittedLayer] = []
  # Fastest first: once one is close enough, nothing slower need be fitted.
  for place in sorted(range(len(candidates)), key=lambda place: sum(times[place])):
    open_sites = [
      site
      for site, (choice, of_site) in enumerate(zip(choices, members, strict=True))
      if choice.could_win(sum(times[place][i] for i in of_site))
    ]
    if not open_sites:
      continue
    wanted = {i for site in open_sites for i in members[site]}
    fits = fit_layers(teacher, candidates[place], wanted)
    measured = measure(teacher, [[Asap(fit.dual_map)] for fit in fits])
    for place in open_sites:
      choices[place].measured.append([measured[i][1] for i in members[place]])
  chosen: list[Measured] = [
    min(of_layer[0], of_layer[-1], key=lambda m: m.milliseconds)._replace(
      label=of_layer[0].label
    )
    for of_layer in of_cuts
  ]
  for site, choice, of_site in zip(teacher.sites, choices, members, strict=True):
    best = choice.best
    if best is None:
      warnings.warn(
        f"{site.name}: no operator reaches target_tv={target_tv}; the teacher's "
        "Sinkhorn attention stays there, with all its iterations",
        stacklevel=3,
      )
      continue
    for index, of_layer in zip(of_site, best, strict=True):
      chosen[index] = of_layer
  everything: list[list[Measured]] = [
    [of_layer[0], of_layer[-1]] for of_layer in of_cuts
  ]
  for choice, of_site in zip(choices, members, strict=True):
    for each in choice.measured:
      for index, of_layer in zip(of_site, each, strict=True):
        everything[index].append(of_layer)
  return everything, chosen, fits


def _candidates(options: FitOptions) -> Iterator[FitOptions]:
  unsorted = tuple(k for k in options.features if k not in ("potentials", "transport"))
  few = max(1, options.slices // 4)
  if unsorted and options.hidden:
    for closures in sorted({2, 5, options.closures}):
      yield options._replace(features=unsorted, hidden=0, closures=closures)
  for closures in sorted({1, 2, options.closures}):
    common = options._replace(closures=closures)
    if unsorted:
      yield common._replace(features=unsorted)
    if unsorted != options.features:
      for slices in sorted({few, options.slices}):
        yield common._replace(slices=slices)


def _untrained_milliseconds(
  teacher: Observer, candidates: list[FitOptions]
) -> list[list[float]]:
  """Times of each candidate on each layer, on one held-out batch."""
  calls = next(teacher.activations("Timing", held_out=True), None)
  if calls is None:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to measure on"
    )
  times = [
    operator_milliseconds(
      of_layer[0],
      [Asap(_untrained(candidate, layer)) for candidate in candidates],
    )
    for layer, of_layer in zip(teacher.layers, calls, strict=True)
  ]
  return [list(of_candidate) for of_candidate in zip(*times, strict=True)]


def _untrained(options: FitOptions, layer: Layer) -> DualMap:
  heads, dim = layer.heads, layer.dim
  columns = feature_count(options.features, options.slices, dim)
  network = None
  rng = jax.random.key(0)
  if options.hidden and options.refine_steps:
    network = init_network(rng, heads, dim, columns, options.hidden)
  directions = gaussian(rng, heads, options.slices, dim)
  weights = jnp.zeros((heads, columns))
  dual_map = DualMap(directions, weights, options.features, network)
  return dual_map.with_closures(options.closures)


def _milliseconds(of_layers: list[Measured]) -> float:
  return sum(measured.milliseconds for measured in of_layers)
