"""Kantorovich potentials as a CPU computes them: sorts by network, and look-ups.

Points stand along the first axis (`asap_jax.potentials.sorting`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from asap_jax import masses
from asap_jax.masses import Masses
from asap_jax.potentials import sorting
from asap_jax.potentials.sorting import places_of, take
from asap_jax.sizes import Size, is_known

# Cumulative masses closer than this, of a total of one, count as equal: float32 sums
# err by less. A jump that rounding hid would give one of its sides, not the midpoint.
MASS_TOLERANCE = 2e-6


class _Sorted(NamedTuple):
  values: Float[Array, "n *batch"]  # ascending, absent points last and zero
  rank: Int[Array, "n *batch"]  # of each point, in the order of the input
  # Valid points; also a method of tuples.
  count: Int[Array, "*batch"] | int  # type: ignore[assignment]
  mass: Float[Array, "n *batch"] | None  # cumulative, if the weights are float


def potentials(
  x: Float[Array, "*batch n"],
  y: Float[Array, "*batch m"],
  x_weights: Masses,
  y_weights: Masses,
) -> tuple[Array, Array, Array]:
  """phi, psi and transport of `Potentials` for the cost -xy.

  Absent points may hold anything, and have any finite potential.
  """
  n, m = x.shape[-1], y.shape[-1]
  xs, ys = _sort(x, y, x_weights, y_weights)
  phi = _integrate(xs, _quantile(ys, xs, n, halfway=False))
  psi = _integrate(ys, _quantile(xs, ys, m, halfway=False))
  psi = psi - xs.values[:1] * ys.values[:1]
  transport = _quantile(ys, xs, n, halfway=True)
  phi, psi, transport = (
    jnp.moveaxis(take(values, sorted_.rank), 0, -1)
    for values, sorted_ in ((phi, xs), (psi, ys), (transport, xs))
  )
  return phi, psi, transport


def one_to_one(count_x: Array | int, count_y: Array | int, mass: Array | None) -> bool:
  """Whether sorted points are known to match one to one."""
  whole = isinstance(count_x, int) and isinstance(count_y, int) and mass is None
  return whole and bool(count_x == count_y)


def _sort(
  x: Array, y: Array, x_weights: Masses, y_weights: Masses
) -> tuple[_Sorted, _Sorted]:
  exact = all(w is None or w.dtype == jnp.bool_ for w in (x_weights, y_weights))
  x, y = _infinite(x, x_weights), _infinite(y, y_weights)
  if x.shape == y.shape:  # both sides in one sort
    values, order = sorting.ascending(jnp.stack([x, y], axis=1))
    of_x, of_y = (values[:, 0], order[:, 0]), (values[:, 1], order[:, 1])
  else:
    of_x, of_y = sorting.ascending(x), sorting.ascending(y)
  return _describe(*of_x, x_weights, exact), _describe(*of_y, y_weights, exact)


def _infinite(x: Array, weights: Masses) -> Array:
  """Points along the first axis; absent ones at infinity, so that they come last."""
  mask = masses.valid(weights)
  return jnp.moveaxis(x if mask is None else jnp.where(mask, x, jnp.inf), -1, 0)


def _describe(values: Array, order: Array, weights: Masses, exact: bool) -> _Sorted:
  n = values.shape[0]
  # Equal points share the first of their places: their potentials are equal, too.
  places = sorting.first_of_equals(values)
  rank = sorting.inverse(order, places)
  mask = masses.valid(weights)
  count: Array | int = n
  if mask is not None:
    count = jnp.broadcast_to(mask.sum(-1), values.shape[1:])
    values = jnp.where(places_of(values) < count, values, 0.0)
  if exact:
    return _Sorted(values, rank, count, None)
  mass = jnp.broadcast_to(masses.normalised(weights, n), (*values.shape[1:], n))
  mass = take(jnp.moveaxis(mass, -1, 0), order)
  return _Sorted(values, rank, count, jnp.cumsum(mass, axis=0))


def _quantile(ys: _Sorted, xs: _Sorted, n: Size, *, halfway: bool) -> Array:
  """Q_y after each of the n points of x, or half-way through its mass: `[n, ...]`.

  Where that level is a jump of Q_y, the mean of both its sides.
  """
  if one_to_one(xs.count, ys.count, ys.mass):
    # Sorted points match one to one: no gather, which is slow on every device.
    above = jnp.concatenate([ys.values[1:], ys.values[-1:]])
    return ys.values if halfway else (ys.values + above) / 2
  if ys.mass is None:
    # Equal masses: i / n is compared with j / m in whole numbers, i m with j n. Rounded
    # ratios would miss jumps, which are common here: one at every i for n = m.
    rank = places_of(xs.values).astype(jnp.uint32)
    count_x, count_y = (jnp.asarray(s.count, jnp.uint32) for s in (xs, ys))
    count_x = jnp.maximum(count_x, 1)
    # Past the last point any finite value will do; the bound also prevents overflow.
    rank = jnp.minimum(rank, count_x - 1)
    level = (2 * rank + 1) * count_y if halfway else (rank + 1) * count_y
    share = 2 * count_x if halfway else count_x
    below = (jnp.maximum(level, 1) - 1) // share
    above = level // share
  else:
    assert xs.mass is not None  # both sides have one or neither
    level = xs.mass
    if halfway:
      level = level - jnp.diff(level, axis=0, prepend=0.0) / 2
    below = sorting.search(ys.mass, level - MASS_TOLERANCE)
    above = sorting.search(ys.mass, level + MASS_TOLERANCE)
  shape = n, *ys.values.shape[1:]
  last = (jnp.maximum(jnp.asarray(ys.count), 1) - 1).astype(jnp.int32)
  below, above = (
    jnp.broadcast_to(jnp.minimum(index.astype(jnp.int32), last), shape)
    for index in (below, above)
  )
  return (take(ys.values, below) + take(ys.values, above)) / 2


def _integrate(xs: _Sorted, slope: Array) -> Array:
  """-sum of slope dx from the smallest point on, constant past the last valid one."""
  steps = slope[:-1] * jnp.diff(xs.values, axis=0)
  if not isinstance(xs.count, int):
    steps = jnp.where(places_of(steps) + 1 < xs.count, steps, 0.0)
  if is_known(*steps.shape[:1]):
    # XLA's own cumulative sum transposes the points on a CPU.
    falls = jax.lax.associative_scan(jnp.add, steps)
  else:
    falls = jnp.cumsum(steps, axis=0)
  return jnp.concatenate([jnp.zeros_like(slope[:1]), -falls])
