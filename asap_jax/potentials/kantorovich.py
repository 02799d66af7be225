r"""Exact one-dimensional Kantorovich potentials, and their sliced form.

For the cost $c(x, y) = -xy$ the optimal coupling of two measures on the line is the
monotone one, and its dual potentials follow from one sort a side (Santambrogio, 2015,
"Optimal Transport for Applied Mathematicians", chapter 2):

$\phi(x_{(i+1)}) - \phi(x_{(i)}) = -Q_y(u_i) (x_{(i+1)} - x_{(i)})$,

where $Q_y$ is the quantile function of y and $u_i$ the mass of the first i points of x.
Where $u_i$ falls on a jump of $Q_y$, any value between its two sides is optimal. Both
sides take the midpoint: with it $\phi + \psi = c$ holds wherever mass is coupled.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from asap_jax import masses
from asap_jax.masses import Masses, check_weights, zero_invalid
from asap_jax.numerics import exact_einsum, float_dtype
from asap_jax.potentials import sorting
from asap_jax.potentials.sorting import places_of, take

# Cumulative masses closer than this, of a total of one, count as equal: float32 sums
# err by less. A jump that rounding hid would give one of its sides, not the midpoint.
_MASS_TOLERANCE = 2e-6


class Potentials(NamedTuple):
  r"""Dual potentials of a one-dimensional transport problem; zero on absent points.

  >>> x, y = jnp.array([0.0, 2.0]), jnp.array([5.0, 3.0])
  >>> asap_jax.kantorovich_potentials(x, y).transport.tolist()  # 0 to 3, 2 to 5
  [3.0, 5.0]

  Attributes:
    phi: potential of the points x, `[..., n]`, zero at the smallest of them.
    psi: potential of the points y, `[..., m]`; $\phi_i + \psi_j \le c(x_i, y_j)$, with
      equality where the optimal coupling has mass.
    transport: median of the mass that $x_i$ sends, `[..., n]`: $Q_y$ half-way through
      the mass of $x_i$, so the optimal map itself where there is one.
  """

  phi: Float[Array, "... n"]
  psi: Float[Array, "... m"]
  transport: Float[Array, "... n"]


# From here on points stand along the first axis (`asap_jax.potentials.sorting`).
class _Sorted(NamedTuple):
  values: Float[Array, "n *batch"]  # ascending, absent points last and zero
  rank: Int[Array, "n *batch"]  # of each point, in the order of the input
  # Valid points; also a method of tuples.
  count: Int[Array, "*batch"] | int  # type: ignore[assignment]
  mass: Float[Array, "n *batch"] | None  # cumulative, if the weights are float


def kantorovich_potentials(
  x: Float[Array, "*batch n"],
  y: Float[Array, "*batch m"],
  x_weights: Masses = None,
  y_weights: Masses = None,
  *,
  cost: Literal["product", "squared"] = "product",
) -> Potentials:
  r"""Exact dual potentials of transport on the line: one sort a side, no iteration.

  $\max_{\phi, \psi} \sum_i a_i \phi_i + \sum_j b_j \psi_j$ subject to
  $\phi_i + \psi_j \le c(x_i, y_j)$.

  Works under jit, vmap and grad. Potentials are piecewise smooth in x and y, and equal
  where points are. They are piecewise constant in the weights: that gradient is zero.

  >>> x, y = jnp.array([0.0, 1.0, 3.0]), jnp.array([2.0, 1.0, 4.0])
  >>> potentials = asap_jax.kantorovich_potentials(x, y)
  >>> round(float(potentials.phi.sum() + potentials.psi.sum()), 3)  # -(0 + 2 + 12)
  -14.0

  Args:
    x: points `[..., n]`, in any order.
    y: points `[..., m]`.
    x_weights: `None`, mask or masses `[..., n]` (see `asap_jax.masses`); masses below
      two millionths of the total are not told apart.
    y_weights: masses of y, `[..., m]`.
    cost: `"product"` is -xy, `"squared"` is (x - y)^2 / 2.

  Returns:
    `Potentials`, in the order of the inputs, at least float32.

  Raises:
    ValueError: if weights do not fit the points, if `cost` is unknown, or if n * m
      exceeds 2^31, but where n = m and there are no weights.
  """
  n, m = x.shape[-1], y.shape[-1]
  check_weights("x_weights", x_weights, n)
  check_weights("y_weights", y_weights, m)
  if cost not in ("product", "squared"):
    raise ValueError(f"cost={cost!r}: expected 'product' or 'squared'")
  one_to_one = n == m and x_weights is None and y_weights is None
  if n * m > 2**31 and not one_to_one:
    raise ValueError(f"n * m = {n} * {m}: expected at most 2^31, for exact mass ratios")
  dtype = float_dtype(x, y)
  x, y = x.astype(dtype), y.astype(dtype)
  xs, ys = _sort(x, y, x_weights, y_weights)

  phi = _integrate(xs, _quantile(ys, xs, n, halfway=False))
  psi = _integrate(ys, _quantile(xs, ys, m, halfway=False))
  psi = psi - xs.values[:1] * ys.values[:1]
  transport = _quantile(ys, xs, n, halfway=True)

  phi, psi, transport = (
    jnp.moveaxis(take(values, sorted_.rank), 0, -1)
    for values, sorted_ in ((phi, xs), (psi, ys), (transport, xs))
  )
  if cost == "squared":
    # Absent points may hold anything: zeroed before the square, for the gradient.
    phi = phi + zero_invalid(x, x_weights) ** 2 / 2
    psi = psi + zero_invalid(y, y_weights) ** 2 / 2
  return Potentials(
    zero_invalid(phi, x_weights),
    zero_invalid(psi, y_weights),
    zero_invalid(transport, x_weights),
  )


def sliced_potentials(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  directions: Float[Array, "*#batch slices dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> tuple[Potentials, Float[Array, "*batch slices n"]]:
  """Potentials of the cost -xy along every direction, all heads and slices at once.

  Works under jit, vmap and grad, in the directions too.

  >>> query, key = jnp.ones((2, 5, 3)), jnp.ones((2, 7, 3))
  >>> potentials, projected = asap_jax.sliced_potentials(query, key, jnp.eye(3)[None])
  >>> potentials.phi.shape, potentials.psi.shape, projected.shape
  ((2, 3, 5), (2, 3, 7), (2, 3, 5))

  Args:
    query: `[..., n, dim]`.
    key: `[..., m, dim]`.
    directions: `[..., slices, dim]`, broadcast over leading axes, used as given.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: masses of the keys, `[..., m]`.

  Returns:
    `Potentials` with arrays `[..., slices, n]` and `[..., slices, m]`, and the
    projected queries `[..., slices, n]`.

  Raises:
    ValueError: if the head dimensions of the arguments differ, or the weights do not
      fit.
  """
  dims = {query.shape[-1], key.shape[-1], directions.shape[-1]}
  if len(dims) > 1:
    raise ValueError(
      f"query {query.shape}, key {key.shape} and directions {directions.shape}: "
      "expected the same last dimension"
    )
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])
  x, y = (
    # With directions for all of the batch, no array is transposed.
    exact_einsum(
      "...nd,...ld->...nl",
      points,
      jnp.broadcast_to(directions, (*points.shape[:-2], *directions.shape[-2:])),
    ).swapaxes(-1, -2)
    for points in (query, key)
  )
  return kantorovich_potentials(x, y, *masses.by_slice(query_weights, key_weights)), x


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
  # NaN equals nothing, so that absent points, all infinite, are no run of equals.
  places = sorting.first_of_equals(jnp.where(jnp.isfinite(values), values, jnp.nan))
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


def _quantile(ys: _Sorted, xs: _Sorted, n: int, *, halfway: bool) -> Array:
  """Q_y after each of the n points of x, or half-way through its mass: `[n, ...]`.

  Where that level is a jump of Q_y, the mean of both its sides.
  """
  whole = isinstance(xs.count, int) and isinstance(ys.count, int) and ys.mass is None
  if whole and xs.count == ys.count:
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
    below = sorting.search(ys.mass, level - _MASS_TOLERANCE)
    above = sorting.search(ys.mass, level + _MASS_TOLERANCE)
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
  falls = jax.lax.platform_dependent(
    # XLA's own transposes the points on a CPU.
    steps,
    cpu=lambda steps: jax.lax.associative_scan(jnp.add, steps),
    default=lambda steps: jnp.cumsum(steps, axis=0),
  )
  return jnp.concatenate([jnp.zeros_like(slope[:1]), -falls])
