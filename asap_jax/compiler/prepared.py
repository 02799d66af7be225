"""A layer's calls, made ready to fit and to compare many operators on."""

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax import metrics
from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import closure, plan
from asap_jax.compiler.candidates import FAMILIES, Family
from asap_jax.compiler.fitting.descent import refine
from asap_jax.compiler.fitting.quasi_newton import Fitted, LinearFitter, Problem
from asap_jax.compiler.fitting.relative import relative_of
from asap_jax.compiler.fitting.samples import pooled, sample_of
from asap_jax.compiler.fitting.scales import add_network
from asap_jax.compiler.fitting.slicing import principal_directions
from asap_jax.compiler.operators import Asap, Operator, Sinkhorn
from asap_jax.compiler.recorded import Layer
from asap_jax.dual_map.features import dual_features, feature_count
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import centre, log_masses
from asap_jax.teacher.starts import Start, starting_dual

# Pairs of a head, and sequences, that maps are fitted to; a quarter is judged on.
_PAIRS, SEQUENCES = 2**21, 192
_NETWORK_STEPS = 1000


class PreparedLayer:
  """A layer with some of its calls.

  Args:
    layer: of the teacher.
    calls: to fit on.
    held_out: to judge on.
    timed: as the model makes it, for times.
    seed: of a network.
  """

  def __init__(
    self,
    layer: Layer,
    calls: Sequence[Activation],
    held_out: Sequence[Activation],
    timed: Activation,
    seed: int,
  ):
    self.layer, self.timed = layer, timed
    self._seed = seed
    self._calls = _joined(calls, 1.0)
    self.held_out = _joined(held_out, 0.5)
    self._fitters: dict[tuple, LinearFitter] = {}

  @property
  def shapes(self) -> Hashable:
    """Equal where operators take equal times."""
    leaves, structure = jax.tree.flatten((self.timed, self.layer.site.teacher))
    return structure, *((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)

  @functools.cached_property
  def _relative(self):
    teacher = self.layer.site.teacher
    return tuple(
      [relative_of(call, teacher) for call in calls]
      for calls in (self._calls, self.held_out)
    )

  @functools.cached_property
  def _trajectories(self):
    teacher = self.layer.site.teacher
    return [_trajectory(call, teacher, teacher.iterations) for call in self._calls]

  def untrained(self, family: Family, count: int) -> Asap:
    """An operator that takes the time of the family's, whatever it learns."""
    dual_map = self._blank(family)
    if family.hidden:
      first = _first(self._calls[0], 16)
      sample = sample_of(first, self.layer.site.teacher)
      dual_map = add_network(dual_map, sample, family.hidden, jax.random.key(0))
    if count == 0:
      return Asap(dataclasses.replace(dual_map, half=True))
    return Asap(dual_map.with_closures(count))

  def fit(
    self, family: Family, count: int, target_tv: float = 1.0
  ) -> tuple[Operator, float]:
    """A fitted operator and its mean TV on what is held out.

    It is not fitted to the end where it is not going to come within `target_tv`.
    """
    aim = 1.0 if family.hidden else target_tv  # a network brings it closer
    fitted = self._fitter(family).fit(count, target_tv=aim)
    if family.hidden:
      fitted = self._with_network(fitted, family.hidden)
    return Asap(fitted.dual_map), fitted.tv

  def tv_of_iterations(self, most: int, start: Start | None = None) -> list[float]:
    """Mean TV of the teacher stopped after 1 to `most` iterations, on what is held out.

    They begin where the teacher's do, or at `start`.
    """
    own = self.layer.site.teacher
    teacher = own if start is None else dataclasses.replace(own, start=start)
    found = [_tv_of_iterations(call, own, teacher, most) for call in self.held_out]
    total, rows = (sum(parts) for parts in zip(*found, strict=True))
    return [float(tv) for tv in (total / rows).mean(-1)]

  def _blank(self, family: Family) -> DualMap:
    heads, dim = self.layer.heads, self.layer.dim
    directions = (
      principal_directions(self._calls, family.slices)
      if family.slices
      else jnp.ones((heads, 1, dim))
    )
    columns = feature_count(family.features, directions.shape[1], dim)
    weights = jnp.zeros((heads, columns))
    return DualMap(directions, weights, family.features, side=family.side)

  def _fitter(self, family: Family) -> LinearFitter:
    key = family.features, family.slices, family.side
    if key not in self._fitters:
      self._fitters[key] = self._new_fitter(family)
    return self._fitters[key]

  def _new_fitter(self, family: Family) -> LinearFitter:
    dual_map = self._blank(family)
    problems, held_out = (
      [
        Problem(relative, _features(call, dual_map))
        for call, relative in zip(calls, of_calls, strict=True)
      ]
      for calls, of_calls in zip(
        (self._calls, self.held_out), self._relative, strict=True
      )
    )
    if family.side == "key":
      targets = [relative.duals[1][..., None] for relative in self._relative[0]]
    else:
      targets = self._trajectories
    # One width for all of them, so that one program fits all.
    dim = self.layer.dim
    width = max(feature_count(f.features, max(f.slices, 1), dim) for f in FAMILIES)
    return LinearFitter(dual_map, problems, targets, held_out, width)

  def _with_network(self, fitted: Fitted, hidden: int) -> Fitted:
    teacher = self.layer.site.teacher
    pools, held_out = (
      pooled(jax.device_get(sample_of(call, teacher)) for call in calls)
      for calls in (self._calls, self.held_out)
    )
    rng = jax.random.key(self._seed)
    start = add_network(fitted.dual_map, pools[0], hidden, rng)
    refined = refine(
      start, pools, held_out, steps=_NETWORK_STEPS, seed=self._seed, progress=False
    ).dual_map
    tv = fidelity_tv(self.held_out, Asap(refined), teacher)
    return Fitted(refined, tv, _NETWORK_STEPS)


def fidelity_tv(
  calls: Sequence[Activation], operator: Operator, teacher: Sinkhorn
) -> float:
  """Mean TV over heads and rows of an operator's plans to a teacher's."""
  found = [_tv(call, operator, teacher) for call in calls]
  total, rows = (sum(parts) for parts in zip(*found, strict=True))
  return float((total / rows).mean())


def _joined(calls: Sequence[Activation], share: float) -> list[Activation]:
  """Calls of equal shapes joined, some sequences of them."""
  pools: dict[tuple, list[Activation]] = {}
  for call in calls:
    call = dataclasses.replace(call, is_product=None)
    leaves, structure = jax.tree.flatten(call)
    pools.setdefault((structure, *(leaf.shape[1:] for leaf in leaves)), []).append(call)
  joined = [
    jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pool)
    for pool in pools.values()
  ]
  pairs = [call.query.shape[-2] * call.key.shape[-2] for call in joined]
  most = share * _PAIRS / len(joined)
  return [
    _first(call, max(int(min(most // of_call, share * SEQUENCES)), 8))
    for call, of_call in zip(joined, pairs, strict=True)
  ]


def _first(call: Activation, count: int) -> Activation:
  return jax.tree.map(lambda leaf: leaf[:count], call)


def _of_head_first(values: Array) -> Array:
  return jnp.swapaxes(values, 0, 1)


@jax.jit
def _features(call: Activation, dual_map: DualMap) -> Array:
  tokens = (call.query, call.key, *call.masks)
  if dual_map.side == "key":
    tokens = (call.key, call.query, *call.masks[::-1])
  query, key, *masks = tokens
  columns = dual_features(query, key, dual_map.directions, dual_map.features, *masks)
  return _of_head_first(columns)


@functools.partial(jax.jit, static_argnames="count")
def _trajectory(call: Activation, teacher: Sinkhorn, count: int) -> Array:
  """Duals that each of the iterations begins with, `[heads, batch, n, count]`."""
  logits, masks = call.logits, call.masks

  def step(f, _):
    return f + teacher.relaxation * (closure(logits, f, *masks).f - f), f

  start = starting_dual(teacher.start, call.query, call.key, *masks)
  _, duals = jax.lax.scan(step, start, length=count)
  duals = duals - log_masses(call.query_mask)
  return jnp.moveaxis(centre(duals, call.query_mask), (0, 1, 2), (3, 1, 0))


@functools.partial(jax.jit, static_argnames="most")
def _tv_of_iterations(
  call: Activation, teacher: Sinkhorn, cut: Sinkhorn, most: int
) -> tuple[Array, Array]:
  """Sums of TV after each iteration, `[most, heads]`, and rows, `[heads]`."""
  logits, masks = call.logits, call.masks
  duals, _ = teacher.duals(call)
  wanted = plan(logits, duals, *masks)
  start = starting_dual(cut.start, call.query, call.key, *masks)

  def step(f, _):
    found = closure(logits, f, *masks)
    compared = plan(logits, found, *masks)
    total = metrics.total_variation(compared, wanted).sum((0, 2))
    return f + cut.relaxation * (found.f - f), total

  _, totals = jax.lax.scan(step, start, length=most)
  return totals, wanted.sum((0, 2, 3))


@jax.jit
def _tv(call: Activation, operator: Operator, teacher: Sinkhorn) -> tuple[Array, Array]:
  logits, masks = call.logits, call.masks
  wanted = plan(logits, teacher.duals(call)[0], *masks)
  compared = plan(logits, operator.duals(call)[0], *masks)
  total = metrics.total_variation(compared, wanted).sum((0, 2))
  return total, wanted.sum((0, 2, 3))
