"""What stands in each layer of a compiled model, and what was measured there."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.fidelity import FidelitySums, fidelity_sums
from asap_jax.compiler.fitting.stages import FittedLayer, fit_layers
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.measuring import cuts, measure
from asap_jax.compiler.operators import Asap, Operator, Sinkhorn
from asap_jax.compiler.prepared import SEQUENCES, PreparedLayer
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recorded import Layer, Recorded, Trained
from asap_jax.compiler.report import TEACHER, Alternative, LayerReport
from asap_jax.compiler.selection import Candidate, Selection, select
from asap_jax.compiler.sites import Replacement, Site


class Standing(NamedTuple):
  """What is to stand in a layer, and what was measured there.

  Attributes:
    operator: as chosen.
    label: of it.
    sums: its fidelity.
    alternatives: all that was measured, by label.
    teacher_milliseconds: of the teacher as trained.
    seconds: spent on this layer alone.
    candidates: operators that may stand here too, and their TV, by label.
  """

  operator: Operator
  label: str
  sums: FidelitySums
  alternatives: tuple[Alternative, ...]
  teacher_milliseconds: float
  seconds: float
  candidates: Mapping[str, tuple[Operator, float]] = {}

  @property
  def milliseconds(self) -> float:
    """Of the chosen operator."""
    (found,) = (a.milliseconds for a in self.alternatives if a.label == self.label)
    return found


def check_wanted(operator: Any, target_tv: float) -> None:
  """Raises ValueError unless it can be known what is to stand in the layers."""
  if not isinstance(operator, Recipe | Sinkhorn | None):
    raise ValueError(
      f"operator={operator!r}: expected an asap_jax.Recipe, an "
      "asap_jax.compiler.Sinkhorn or None"
    )
  if not 0 <= target_tv <= 1:
    raise ValueError(f"target_tv={target_tv}: expected a number from 0 to 1")


def wanted(
  teacher: Recorded,
  operator: Recipe | Sinkhorn | None,
  target_tv: float,
  seed: int,
  *,
  every: bool = False,
) -> list[Standing]:
  """What is to stand in every layer: the best by measurement, or one fixed operator.

  Args:
    teacher: with its batches.
    operator: see `asap_jax.compile`.
    target_tv: likewise.
    seed: of directions, of networks and of the order of refinement.
    every: whether to fit also what could not be the fastest here.
  """
  if operator is None:
    return best(teacher, target_tv, seed, every=every)
  return fixed(teacher, operator, seed)


def best(
  teacher: Recorded, target_tv: float, seed: int, *, every: bool
) -> list[Standing]:
  """The best operators by measurement, of every layer.

  Args:
    teacher: with its batches.
    target_tv: see `asap_jax.compile`.
    seed: of networks.
    every: whether to fit also what could not be the fastest here.
  """
  ratios: dict[Any, float] = {}
  return _chosen(
    teacher,
    seed,
    lambda site, layers: select(layers, target_tv, every=every, ratios=ratios),
  )


def best_of(
  teacher: Recorded, kept: Mapping[str, CandidateAttention], target_tv: float
) -> list[Standing]:
  """The best of the candidates that are kept for a site, by its name."""

  def select_kept(site: Trained, layers: Sequence[PreparedLayer]) -> Selection:
    given = _candidates(kept[site.name], layers) if site.name in kept else {}
    return select(layers, target_tv, given)

  return _chosen(teacher, 0, select_kept)


def _candidates(
  kept: CandidateAttention, layers: Sequence[PreparedLayer]
) -> dict[str, Candidate]:
  def of_layer(held: Sinkhorn | AsapAttention, index: int | None) -> Operator:
    if isinstance(held, Sinkhorn):
      return held
    dual_map = held.dual_map
    return Asap(
      dual_map if index is None else jax.tree.map(lambda leaf: leaf[index], dual_map)
    )

  tvs = dict(kept.tvs)
  return {
    label: Candidate(
      tuple(of_layer(held, each.layer.index) for each in layers), tvs[label]
    )
    for label, held in kept.operators.items()
  }


def _chosen(
  teacher: Recorded,
  seed: int,
  choose: Callable[[Trained, Sequence[PreparedLayer]], Selection],
) -> list[Standing]:
  calls, held_out = teacher.sample(SEQUENCES)
  layers = [
    PreparedLayer(
      layer,
      [each for of_batch in calls for each in of_batch[index]],
      [each for of_batch in held_out for each in of_batch[index]],
      teacher.timed[index],
      seed,
    )
    for index, layer in enumerate(teacher.layers)
  ]
  standing = []
  for site in track(teacher.sites, "Choosing", disable=not teacher.progress):
    start = time.perf_counter()
    own = [layer for layer in layers if layer.layer.site is site]
    selection = choose(site, own)
    seconds = (time.perf_counter() - start) / len(own)
    standing += [
      _selected(layer, selection, place, seconds) for place, layer in enumerate(own)
    ]
  return standing


def _selected(
  layer: PreparedLayer, selection: Selection, place: int, seconds: float
) -> Standing:
  chosen = selection.measured[selection.chosen]
  operator, teacher = chosen.operators[place], layer.layer.site.teacher
  sums = [fidelity_sums(call, [operator], teacher)[0] for call in layer.held_out]
  alternatives = tuple(
    Alternative(label, each.tvs[place], each.milliseconds[place])
    for label, each in selection.measured.items()
  )
  return Standing(
    operator,
    selection.chosen,
    functools.reduce(lambda a, b: a + b, sums),
    alternatives,
    selection.measured[TEACHER].milliseconds[place],
    seconds,
    {
      label: (each.operators[place], each.tvs[place])
      for label, each in selection.within.items()
    },
  )


def fixed(teacher: Recorded, operator: Recipe | Sinkhorn, seed: int) -> list[Standing]:
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
  standing = []
  for index, (before, chosen, *others) in enumerate(measure(teacher, compared)):
    if any(other.label == chosen.label for other in others):
      # As many iterations as a cut of the teacher, but others: from another start, say.
      chosen = chosen._replace(label=f"{chosen.label}, as given")
    alternatives = tuple(each.alternative for each in (chosen, *others, before))
    standing.append(
      Standing(
        chosen.operator,
        chosen.label,
        chosen.sums,
        alternatives,
        before.milliseconds,
        fitted[index].seconds if fitted else 0.0,
      )
    )
  return standing


def attention_at(
  site: Site,
  layers: Sequence[Layer],
  standing: Sequence[Standing],
  *,
  keep_candidates: bool = False,
) -> Callable[..., jax.Array]:
  """What stands at a site, its dual maps stacked if a scan runs several layers."""
  own = [
    each for layer, each in zip(layers, standing, strict=True) if layer.site is site
  ]
  is_stacked = any(layer.site is site and layer.index is not None for layer in layers)
  if not keep_candidates:
    if own[0].label == TEACHER:
      return Replacement(site.function)
    held = _held([each.operator for each in own], site, is_stacked)
    if isinstance(held, AsapAttention):
      return held
    return Replacement(held.attention_fn, **site.options)
  operators, tvs = {}, {}
  for label in own[0].candidates:
    of_layers, tvs[label] = zip(*(each.candidates[label] for each in own), strict=True)
    operators[label] = _held(of_layers, site, is_stacked)
  return CandidateAttention(operators, tvs, own[0].label, site.options)


def _held(
  operators: Sequence[Operator], site: Site, is_stacked: bool
) -> Sinkhorn | AsapAttention:
  maps = [each.dual_map for each in operators if isinstance(each, Asap)]
  if not maps:
    (iterations,) = {each for each in operators if isinstance(each, Sinkhorn)}
    return iterations
  if not is_stacked:
    return AsapAttention(maps[0], site.options)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *maps)
  return AsapAttention(stacked, site.options)


def report_of(layer: Layer, standing: Standing) -> LayerReport:
  """The figures of what stands in a layer."""
  sums = standing.sums
  predicted = 1.0 - sums.residual / np.where(sums.power > 0, sums.power, 1.0)
  query_side = (
    isinstance(standing.operator, Asap) and standing.operator.dual_map.side == "query"
  )
  return LayerReport(
    name=layer.name,
    iterations=layer.site.teacher.iterations,
    r2=predicted if query_side else np.full_like(sums.tv, np.nan),
    tv=sums.tv / sums.rows,
    kl=sums.kl / sums.rows,
    column_error=sums.column_error / sums.columns,
    teacher_column_error=sums.teacher_column_error / sums.columns,
    teacher_milliseconds=standing.teacher_milliseconds,
    milliseconds=standing.milliseconds,
    seconds=standing.seconds,
    alternatives=standing.alternatives,
    chosen=standing.label,
  )
