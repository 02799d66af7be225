"""Kantorovich potentials as ONNX computes them: one sort, look-ups, no loop.

Arrays are `[..., points]`. Operators of ONNX sort floats and look places up, but do not
go on until data say so; places are numbers of 32 bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from asap_jax import masses
from asap_jax.masses import Masses
from asap_jax.potentials.carrying import hold, move, places_of, sort_with
from asap_jax.sizes import Size, at_most


class _Sorted(NamedTuple):
  values: Float[Array, "*batch n"]  # ascending, absent points last and zero
  order: Int[Array, "*batch n"]  # the places in the input that they came from
  first: Bool[Array, "*batch n"]  # of points that are equal
  # Valid points, `None` for all; also a method of tuples.
  count: Int[Array, "*#batch 1"] | None  # type: ignore[assignment]


def potentials(
  x: Float[Array, "*batch n"],
  y: Float[Array, "*batch m"],
  x_weights: Masses,
  y_weights: Masses,
) -> tuple[Array, Array, Array]:
  """phi, psi and transport as of `on_cpu.potentials`, up to rounding.

  Raises:
    ValueError: if masses are floats, or there are too many points for 32 bits.
  """
  for name, given in (("x_weights", x_weights), ("y_weights", y_weights)):
    if given is not None and given.dtype != jnp.bool_:
      raise ValueError(f"{name} has dtype {given.dtype}: expected a mask for ONNX")
  n, m = x.shape[-1], y.shape[-1]
  if at_most(2 * n * m, 2**31 - 1) is False:
    raise ValueError(f"n * m = {n} * {m}: expected at most 2^30 for ONNX")
  xs, ys = _sort(x, x_weights), _sort(y, y_weights)
  phi = _integrate(xs, _quantile(ys, xs, m, halfway=False))
  psi = _integrate(ys, _quantile(xs, ys, n, halfway=False))
  psi = psi - xs.values[..., :1] * ys.values[..., :1]
  # Equal points are sent where the first of them is.
  transport = hold(xs.first, _quantile(ys, xs, m, halfway=True), False)
  phi, transport = move(xs.order, phi, transport)
  (psi,) = move(ys.order, psi)
  return phi, psi, transport


def _sort(points: Array, weights: Masses) -> _Sorted:
  mask = masses.valid(weights)
  keys = points if mask is None else jnp.where(mask, points, jnp.inf)
  values, order = sort_with(keys)
  places = places_of(values)
  before = jnp.concatenate([values[..., :1], values[..., :-1]], axis=-1)
  first = (values != before) | (places == 0)
  if mask is None:
    return _Sorted(values, order, first, None)
  count = mask.astype(jnp.int32).sum(-1, keepdims=True)
  return _Sorted(jnp.where(places < count, values, 0.0), order, first, count)


def _quantile(ys: _Sorted, xs: _Sorted, m: Size, *, halfway: bool) -> Array:
  """Q_y after each of the n points of x, or half-way through its mass: `[..., n]`."""
  n = xs.values.shape[-1]
  if xs.count is None and ys.count is None and n == m:
    # Sorted points match one to one.
    above = jnp.concatenate([ys.values[..., 1:], ys.values[..., -1:]], axis=-1)
    return ys.values if halfway else (ys.values + above) / 2
  # i / n is compared with j / m in whole numbers, as of `on_cpu`.
  rank = places_of(xs.values)
  count_x, count_y = (
    jnp.full_like(rank, size)
    if side.count is None
    else jnp.broadcast_to(jnp.maximum(side.count, 1), rank.shape)
    for side, size in ((xs, n), (ys, m))
  )
  rank = jnp.minimum(rank, count_x - 1)
  level = (2 * rank + 1) * count_y if halfway else (rank + 1) * count_y
  share = 2 * count_x if halfway else count_x
  below = jax.lax.div(jnp.maximum(level, 1) - 1, share)
  above = jax.lax.div(level, share)
  sides = (
    jnp.take_along_axis(
      ys.values, jnp.minimum(at, count_y - 1), axis=-1, mode="promise_in_bounds"
    )
    for at in (below, above)
  )
  return (next(sides) + next(sides)) / 2


def _integrate(xs: _Sorted, slope: Array) -> Array:
  """-sum of slope dx from the smallest point on, constant past the last valid one."""
  steps = slope[..., :-1] * (xs.values[..., 1:] - xs.values[..., :-1])
  if xs.count is not None:
    steps = jnp.where(places_of(steps) + 1 < xs.count, steps, 0.0)
  falls = jnp.cumsum(steps, axis=-1)
  return jnp.concatenate([jnp.zeros_like(slope[..., :1]), -falls], axis=-1)
