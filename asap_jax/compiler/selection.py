"""Choosing each layer's operator by measurement: the fastest that is close enough.

Nothing is fitted that could not win. Iterations cut short and Gaussian starts need no
fit, and with the exact iterations they give a first choice; a map is fitted where it
would take less time than the choice so far and may come close enough, which the fits
before tell. In the end all that was measured is timed once more, in turn.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from asap_jax.compiler.candidates import (
  CUTS,
  DIAGONAL,
  FAMILIES,
  STARTS,
  Family,
  Point,
  choose,
  predicted_tv,
)
from asap_jax.compiler.clock import attention_call, milliseconds_in_turn
from asap_jax.compiler.operators import Operator, Sinkhorn, Softmax
from asap_jax.compiler.prepared import PreparedLayer, fidelity_tv
from asap_jax.compiler.report import TEACHER
from asap_jax.teacher.starts import Start

# A fit may come closer than is predicted by this factor; of families without a fit, and
# of those with some.
_HOPE, _OWN_HOPE = 1.25, 1.05
# Of the time of the choice so far: less is not worth a fit.
_GAIN = 0.03
# Of timing, beyond five rounds, for a site.
_SECONDS = 1.5


class Candidate(NamedTuple):
  """An operator of each layer of a site, the largest TV of them, and their times."""

  operators: tuple[Operator, ...]
  tvs: tuple[float, ...]
  milliseconds: tuple[float, ...] = ()

  @property
  def point(self) -> Point:
    """Time of all layers, and the TV of the farthest."""
    return Point(sum(self.milliseconds), max(self.tvs))


class Selection(NamedTuple):
  """What was measured on a site, by label.

  Attributes:
    measured: all of it.
    within: what is close enough to stand there.
    chosen: label of what is to stand there.
  """

  measured: dict[str, Candidate]
  within: dict[str, Candidate]
  chosen: str


def select(
  layers: Sequence[PreparedLayer],
  target_tv: float,
  given: Mapping[str, Candidate] | None = None,
  *,
  every: bool = False,
  ratios: dict[Any, float] | None = None,
) -> Selection:
  """The fastest operator of a site that comes within `target_tv` in all its layers.

  Args:
    layers: those that run through the site: one, or those of a scan, which share their
      operator.
    target_tv: largest TV to the teacher's plans, mean over heads and rows.
    given: to choose among, beside the exact iterations, in place of fitting any.
    every: whether to fit one map of each family that comes close enough, also where it
      could not be the fastest.
    ratios: what maps take in the time of the exact iterations, to share between sites:
      those of equal shapes are timed once.
  """
  search = _Search(layers, target_tv, given, every, {} if ratios is None else ratios)
  if given is None:
    search.run()
  return search.result()


class _Search:
  """What is known so far of a site's candidates."""

  def __init__(
    self,
    layers: Sequence[PreparedLayer],
    target_tv: float,
    given: Mapping[str, Candidate] | None,
    every: bool,
    ratios: dict[Any, float],
  ):
    self._ratios = ratios
    self._layers, self._target, self._every = layers, target_tv, every
    self._teacher = layers[0].layer.site.teacher
    self._found = (
      self._unlearned() if given is None else self._timed(self._uncut() | dict(given))
    )
    self._fitted: dict[tuple[str, int], float] = {}
    dim = layers[0].layer.dim
    self._families = [family for family in FAMILIES if family.slices <= dim]

  @property
  def _cuts(self) -> list[int]:
    return [k for k in CUTS if k < self._teacher.iterations]

  @property
  def _exact(self) -> tuple[str, str]:
    """Labels of all iterations: in the fastest form, and as the model was trained."""
    return f"sinkhorn@{self._teacher.iterations}", TEACHER

  def _uncut(self) -> dict[str, Candidate]:
    fastest = dataclasses.replace(self._teacher, implementation=None)
    zeros = (0.0,) * len(self._layers)
    return {
      label: self._shared(operator, zeros)
      for label, operator in zip(self._exact, (fastest, self._teacher), strict=True)
    }

  def _unlearned(self) -> dict[str, Candidate]:
    """The exact iterations, fewer of them, and Gaussian starts."""
    found = self._uncut()
    most = max(self._cuts, default=0)
    if most:
      tvs = [layer.tv_of_iterations(most) for layer in self._layers]
      for k in self._cuts:
        cut = dataclasses.replace(self._teacher, iterations=k, implementation=None)
        found[f"sinkhorn@{k}"] = self._shared(cut, [tv[k - 1] for tv in tvs])
    starts = [start for start in STARTS if start != self._teacher.start]
    for start in cast(Sequence[Start], starts):
      tvs = [layer.tv_of_iterations(2, start) for layer in self._layers]
      for k in range(1, min(2, self._teacher.iterations) + 1):
        begun = Sinkhorn(k, start=start)
        found[f"{start}@{k}"] = self._shared(begun, [tv[k - 1] for tv in tvs])
    # Softmax is half a closure that predicts nothing: only its time is of use.
    softmax = {"softmax": self._shared(Softmax(), [1.0] * len(self._layers))}
    timed = self._timed(found | softmax)
    self._half_ms = timed.pop("softmax").point.milliseconds
    return timed

  def _shared(self, operator: Operator, tvs: Sequence[float]) -> Candidate:
    return Candidate((operator,) * len(self._layers), tuple(map(float, tvs)))

  def _timed(
    self, found: dict[str, Candidate], seconds: float = 0.0
  ) -> dict[str, Candidate]:
    """The same with times, measured in turn."""
    runs = {
      (label, place): attention_call(operator, layer.timed)
      for label, candidate in found.items()
      for place, (operator, layer) in enumerate(
        zip(candidate.operators, self._layers, strict=True)
      )
    }

    def with_times(times):
      return {
        label: candidate._replace(
          milliseconds=tuple(times[label, i] for i in range(len(self._layers)))
        )
        for label, candidate in found.items()
      }

    def decide(times):
      return self._choice(with_times(times))

    return with_times(milliseconds_in_turn(runs, decide, seconds))

  def _choice(self, found: dict[str, Candidate]) -> str:
    return choose({label: each.point for label, each in found.items()}, self._target)

  def run(self) -> None:
    """Fits maps while one may be faster than the choice so far, and close enough."""
    while (place := self._next()) is not None:
      family, count = place
      fits = [layer.fit(family, count, self._target) for layer in self._layers]
      operators, tvs = zip(*fits, strict=True)
      self._fitted[family.name, count] = max(tvs)
      new = Candidate(operators, tvs)
      label = family.label(count)
      self._found[label] = self._timed({label: new})[label]

  def result(self) -> Selection:
    """All that was measured, timed in turn, and the choice."""
    best = self._found[self._choice(self._found)].point.milliseconds
    # What is far slower keeps its first times, but for what the gain is told from.
    near = {
      label: each
      for label, each in self._found.items()
      if each.point.milliseconds < 3.0 * best or label in self._exact
    }
    found = self._found | self._timed(near, _SECONDS)
    # Fits are judged by the algebra of the fit: what is to stand, by its own plans.
    verified: set[str] = set()
    while (label := self._choice(found)) not in verified:
      verified.add(label)
      if label in self._exact:
        break
      tvs = [
        fidelity_tv(layer.held_out, operator, self._teacher)
        for layer, operator in zip(self._layers, found[label].operators, strict=True)
      ]
      found[label] = found[label]._replace(tvs=tuple(tvs))
    within = {k: v for k, v in found.items() if v.point.tv <= self._target}
    return Selection(found, within, label)

  def _next(self) -> tuple[Family, int] | None:
    """The map to fit next: the one that is expected to be the fastest within reach."""
    best = self._found[self._choice(self._found)].point.milliseconds
    worth = math.inf if self._every else (1.0 - _GAIN) * best
    if not self._fitted:
      # All others are expected in terms of this one.
      least = min(self._closures_ms(0), self._closures_ms(1))
      return (DIAGONAL, 1) if least < worth else None
    found = None
    for family in self._families:
      count = self._within_reach(family)
      if count is None:
        continue
      if self._every:
        return family, count
      # What cannot come before the fastest found is not even timed.
      if self._is_faster(family, count, worth):
        milliseconds = self._expected_ms(family, count)
        if milliseconds < worth:
          worth, found = milliseconds, (family, count)
    return found

  def _within_reach(self, family: Family) -> int | None:
    """The least number of closures not fitted yet that may come close enough."""
    own = any(name == family.name for name, _ in self._fitted)
    reach = (_OWN_HOPE if own else _HOPE) * self._target
    for count in family.counts:
      tv = self._fitted.get((family.name, count))
      if tv is None:
        if predicted_tv(family, count, self._fitted) <= reach:
          return count
      elif tv <= self._target:
        break  # more closures are slower
    return None

  def _is_faster(self, family: Family, count: int, worth: float) -> bool:
    """Whether a map is expected to take less; those within it are timed first.

    What takes longest to compile is seldom reached.
    """
    within = [other for other in self._families if family.holds(other)]
    return self._closures_ms(count) < worth and all(
      self._expected_ms(other, count) < worth for other in within
    )

  def _closures_ms(self, count: int) -> float:
    """Time of so many closures: that of as many iterations."""
    if count == 0:
      return self._half_ms
    counts = [*self._cuts, self._teacher.iterations]
    times = [self._found[f"sinkhorn@{k}"].point.milliseconds for k in counts]
    return float(np.interp(count, counts, times))

  def _expected_ms(self, family: Family, count: int) -> float:
    """Time of a map: of its first number of closures, and of those beyond."""
    first = family.counts[0]
    key = family.name, *(layer.shapes for layer in self._layers)
    if key not in self._ratios:
      self._ratios[key] = self._untrained_ratio(family, first)
    milliseconds = self._ratios[key] * self._found[self._exact[0]].point.milliseconds
    if count > first:
      milliseconds += self._closures_ms(count) - self._closures_ms(first)
    return milliseconds

  def _untrained_ratio(self, family: Family, count: int) -> float:
    """Time of a map before it is fitted, in that of the exact iterations, in turn.

    A machine is not as fast at all times: the ratio of the two lasts.
    """
    exact = self._exact[0]
    runs = {
      (label, place): attention_call(operator, layer.timed)
      for place, layer in enumerate(self._layers)
      for label, operator in (
        (exact, self._found[exact].operators[place]),
        (family.name, layer.untrained(family, count)),
      )
    }
    times = milliseconds_in_turn(runs)
    before, own = (
      sum(ms for (name, _), ms in times.items() if name == label)
      for label in (exact, family.name)
    )
    return own / before
