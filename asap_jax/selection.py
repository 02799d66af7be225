"""Choosing each layer's operator by measurement: the fastest that is close enough."""

import warnings
from collections.abc import Iterator

from asap_jax.fidelity import Operator
from asap_jax.fitting import FitOptions, FittedLayer, fit_layers
from asap_jax.measure import Measured, cuts, measure
from asap_jax.observe import Observer


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

  def could_win(self, untrained: list[Measured]) -> bool:
    """Whether an operator as fast as this would be chosen, if only it were close."""
    best = self.best
    return best is None or _milliseconds(untrained) < _milliseconds(best)


def select(
  teacher: Observer, options: FitOptions, target_tv: float
) -> tuple[list[list[Measured]], list[Measured], list[FittedLayer]]:
  """The fastest operator of each site whose TV is at most `target_tv`.

  Candidates are Sinkhorn cut short, and dual maps without a sort, on a quarter of the
  slices and on all, followed by one or two closures (or as many as `options` say). A
  map is refined only where its time, which does not depend on its parameters, is below
  that of the best so far.

  Returns:
    For each layer all that was measured, the teacher first; what was chosen; and the
    last fit.
  """
  layers = teacher.layers
  members = [
    [i for i, layer in enumerate(layers) if layer.site is site]
    for site in teacher.sites
  ]
  choices = [Choice(target_tv) for _ in members]
  of_cuts = measure(teacher, [cuts(layer.site.iterations) for layer in layers])
  for choice, of_site in zip(choices, members, strict=True):
    choice.measured = [
      list(each) for each in zip(*(of_cuts[i][1:] for i in of_site), strict=True)
    ]
  plain = []
  for candidate in _candidates(options):
    fits = fit_layers(teacher, candidate._replace(refine_steps=0))
    if candidate.refine_steps and candidate.hidden:
      # A network takes its time whatever it holds: one step shows it.
      fits = fit_layers(teacher, candidate._replace(refine_steps=1, progress=False))
    timed = measure(teacher, [[_operator(fit)] for fit in fits])
    plain.append((candidate, fits, [of_layer[1] for of_layer in timed]))
  total = [sum(m.milliseconds for m in timed) for _, _, timed in plain]
  for place in sorted(range(len(plain)), key=total.__getitem__):
    candidate, fits, timed = plain[place]
    open_sites = [
      site
      for site, (choice, of_site) in enumerate(zip(choices, members, strict=True))
      if choice.could_win([timed[i] for i in of_site])
    ]
    wanted = {i for site in open_sites for i in members[site]}
    measured = timed
    if wanted and candidate.refine_steps:
      fits = fit_layers(teacher, candidate, wanted)
      again = measure(teacher, [[_operator(fit)] for fit in fits])
      measured = [of_layer[1] for of_layer in again]
    for site in open_sites:
      choices[site].measured.append([measured[i] for i in members[site]])
  chosen: list[Measured] = [of_layer[0] for of_layer in of_cuts]
  for site, choice, of_site in zip(teacher.sites, choices, members, strict=True):
    best = choice.best
    if best is None:
      warnings.warn(
        f"{site.name}: no operator reaches target_tv={target_tv}; the teacher's "
        "Sinkhorn attention stays there",
        stacklevel=3,
      )
      continue
    for index, of_layer in zip(of_site, best, strict=True):
      chosen[index] = of_layer
  everything: list[list[Measured]] = [[of_layer[0]] for of_layer in of_cuts]
  for choice, of_site in zip(choices, members, strict=True):
    for each in choice.measured:
      for index, of_layer in zip(of_site, each, strict=True):
        everything[index].append(of_layer)
  return everything, chosen, fits


def _candidates(options: FitOptions) -> Iterator[FitOptions]:
  unsorted = tuple(k for k in options.features if k not in ("potentials", "transport"))
  few = max(1, options.slices // 4)
  for closures in sorted({1, 2, options.closures}):
    common = options._replace(closures=closures)
    if unsorted:
      yield common._replace(features=unsorted)
    if unsorted != options.features:
      for slices in sorted({few, options.slices}):
        yield common._replace(slices=slices)


def _operator(fit: FittedLayer) -> Operator:
  return Operator("asap", dual_map=fit.dual_map)


def _milliseconds(of_layers: list[Measured]) -> float:
  return sum(measured.milliseconds for measured in of_layers)
