"""Kantorovich potentials as accelerators compute them: by sorts that carry values.

Arrays are `[..., points]`. What `on_cpu` looks up in the other side's quantile function
is found here by sorting the levels of both sides into one sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from asap_jax import masses
from asap_jax.masses import Masses
from asap_jax.potentials.carrying import alike, hold, move, places_of, shift, sort_with
from asap_jax.potentials.on_cpu import MASS_TOLERANCE, one_to_one


class _Sorted(NamedTuple):
  values: Float[Array, "*batch n"]  # ascending, absent points last and zero
  order: Int[Array, "*batch n"]  # the places in the input that they came from
  first: Bool[Array, "*batch n"]  # of points that are equal
  # Valid points; also a method of tuples.
  count: Int[Array, "*#batch 1"] | int  # type: ignore[assignment]
  mass: Float[Array, "*batch n"] | None  # of each point, if the weights are float


# JAX traces this branch on a CPU too: once for all layers of a shape.
@jax.jit
def potentials(
  x: Float[Array, "*batch n"],
  y: Float[Array, "*batch m"],
  x_weights: Masses,
  y_weights: Masses,
) -> tuple[Array, Array, Array]:
  """phi, psi and transport as of `on_cpu.potentials`, up to rounding."""
  xs, ys = _sort(x, y, x_weights, y_weights)
  phi = _integrate(xs, _quantile(ys, xs, halfway=False))
  psi = _integrate(ys, _quantile(xs, ys, halfway=False))
  psi = psi - xs.values[..., :1] * ys.values[..., :1]
  # Equal points are sent where the first of them is, and share its gradient.
  transport = hold(xs.first, _quantile(ys, xs, halfway=True), False)
  phi, transport = move(xs.order, alike(xs.first, phi), transport)
  (psi,) = move(ys.order, alike(ys.first, psi))
  return phi, psi, transport


def _sort(
  x: Array, y: Array, x_weights: Masses, y_weights: Masses
) -> tuple[_Sorted, _Sorted]:
  exact = all(w is None or w.dtype == jnp.bool_ for w in (x_weights, y_weights))
  of_x, of_y = (_operands(*side, exact) for side in ((x, x_weights), (y, y_weights)))
  if x.shape == y.shape:  # both sides in one sort, so half of the code
    both = sort_with(*map(lambda *pair: jnp.stack(pair, axis=-2), of_x, of_y))
    of_x, of_y = ([a[..., side, :] for a in both] for side in (0, 1))
  else:
    of_x, of_y = (list(sort_with(*operands)) for operands in (of_x, of_y))
  return _describe(x_weights, *of_x), _describe(y_weights, *of_y)


def _operands(points: Array, weights: Masses, exact: bool) -> list[Array]:
  """Points, absent ones at infinity so that they come last, and their masses."""
  mask = masses.valid(weights)
  keys = points if mask is None else jnp.where(mask, points, jnp.inf)
  if exact:
    return [keys]
  mass = masses.normalised(weights, points.shape[-1]).astype(points.dtype)
  return [keys, jax.lax.stop_gradient(jnp.broadcast_to(mass, points.shape))]


def _describe(
  weights: Masses, values: Array, order: Array, mass: Array | None = None
) -> _Sorted:
  first = (values != shift(values, 1)) | (places_of(values) == 0)
  mask = masses.valid(weights)
  if mask is None:
    return _Sorted(values, order, first, values.shape[-1], mass)
  count = mask.sum(-1, keepdims=True, dtype=jnp.int32)
  values = jnp.where(places_of(values) < count, values, 0.0)
  return _Sorted(values, order, first, count, mass)


def _quantile(ys: _Sorted, xs: _Sorted, *, halfway: bool) -> Array:
  """Q_y after each of the n points of x, or half-way through its mass: `[..., n]`.

  Where that level is a jump of Q_y, the mean of both its sides.
  """
  if one_to_one(xs.count, ys.count, ys.mass):
    # Sorted points match one to one.
    above = jnp.concatenate([ys.values[..., 1:], ys.values[..., -1:]], axis=-1)
    return ys.values if halfway else (ys.values + above) / 2
  n = xs.values.shape[-1]
  levels, ends, width = _levels(ys, xs, halfway)
  # The levels of x and the ends of the points of y in one sequence, those of x first
  # where they are equal. Each end brings its point of y, where Q_y is before it.
  levels, places, values = sort_with(
    jnp.concatenate([levels, ends], axis=-1),
    jnp.concatenate([jnp.zeros_like(xs.values), ys.values], axis=-1),
  )
  is_end = places >= n
  is_point = is_end & (places - n < jnp.asarray(ys.count, jnp.int32))
  below = hold(is_point, values, True)
  # An end that comes next and is as high is a jump: Q_y after it is before the next.
  near = shift(levels, -1) - levels < width
  above = jnp.where(shift(is_end, -1) & near, shift(below, -2), below)
  return move(places, (below + above) / 2)[0][..., :n]


def _levels(
  ys: _Sorted, xs: _Sorted, halfway: bool
) -> tuple[Array, Array, Array | float]:
  """Levels of x `[..., n]`, ends of y `[..., m]`; how far apart two are told apart.

  No level is above the end of the last point of y: past it any finite value will do.
  """
  rank, place = places_of(xs.values), places_of(ys.values)
  is_last = place >= jnp.asarray(ys.count, jnp.int32) - 1
  if xs.mass is not None and ys.mass is not None:
    level = jnp.cumsum(xs.mass, axis=-1)
    level = level - xs.mass / 2 if halfway else level
    # Lowered, so that levels which count as equal to an end come before it.
    ends = jnp.where(is_last, 2.0, jnp.cumsum(ys.mass, axis=-1))
    return level - MASS_TOLERANCE, ends, 2 * MASS_TOLERANCE
  # Equal masses: whole numbers, as of `on_cpu`.
  rank, place = rank.astype(jnp.uint32), place.astype(jnp.uint32)
  count_x, count_y = (
    jnp.maximum(jnp.asarray(side.count, jnp.uint32), 1) for side in (xs, ys)
  )
  rank = jnp.minimum(rank, count_x - 1)
  level = (2 * rank + 1) * count_y if halfway else (rank + 1) * count_y
  ends = (place + 1) * (2 * count_x if halfway else count_x)
  highest = jnp.iinfo(jnp.uint32).max
  return level, jnp.where(is_last, jnp.uint32(highest), ends), jnp.uint32(1)


def _integrate(xs: _Sorted, slope: Array) -> Array:
  """-sum of slope dx from the smallest point on, constant past the last valid one."""
  steps = slope[..., :-1] * jnp.diff(xs.values, axis=-1)
  if not isinstance(xs.count, int):
    steps = jnp.where(places_of(steps) + 1 < xs.count, steps, 0.0)
  falls = jnp.cumsum(steps, axis=-1)
  return jnp.concatenate([jnp.zeros_like(slope[..., :1]), -falls], axis=-1)
