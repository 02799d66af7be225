"""Optimal couplings on the line, one per slice, in sparse form.

For the cost $-xy$ of projections x and y the optimal coupling is the monotone one (see
`asap_jax.potentials.kantorovich`): sorted queries and keys are laid side by side, each
with its share of the mass, and overlap where they are coupled. It has at most
$n + m - 1$ entries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from asap_jax.attention.inputs import Inputs
from asap_jax.masses import valid
from asap_jax.numerics import exact_einsum, float_dtype
from asap_jax.potentials.sorting import inverse, order_of

Mask = Bool[Array, "..."] | None


class Couplings(NamedTuple):
  """Couplings of n queries with m keys along slices; the plan is their sum.

  Attributes:
    queries: of each entry, `[..., slices, entries]`; `None` if entry i is query i.
    keys: of each entry, `[..., slices, entries]`.
    shares: attention that each entry carries; zero where there is none.
    size: n and m.
  """

  queries: Int[Array, "*batch slices entries"] | None
  keys: Int[Array, "*batch slices entries"]
  shares: Float[Array, "*batch slices entries"]
  size: tuple[int, int]

  def dense(self) -> Float[Array, "*batch n m"]:
    """Sum of all couplings, `[..., n, m]`."""
    n, m = self.size
    queries = jnp.arange(n) if self.queries is None else self.queries
    flat = _merge_slices(queries * m + self.keys)
    sums = _segment_sum(_merge_slices(self.shares)[..., None], flat, n * m)
    return sums.reshape(*self.keys.shape[:-2], n, m)

  def apply(
    self,
    value: Float[Array, "*batch m features"],
    precision: jax.lax.PrecisionLike = None,
  ) -> Float[Array, "*batch n features"]:
    """Plan times values: gathers, and sums where a query has several entries.

    `precision` is without effect, as nothing is multiplied.
    """
    moved = self.moved(value)
    if self.queries is None:
      out = moved.sum(-3)
    else:
      flat = moved.reshape(*moved.shape[:-3], -1, moved.shape[-1])
      out = _segment_sum(flat, _merge_slices(self.queries), self.size[0])
    return out.astype(value.dtype)

  def moved(
    self, value: Float[Array, "*batch m features"]
  ) -> Float[Array, "*batch slices entries features"]:
    """Values times shares, entry by entry, in float32 or better."""
    wide = value.astype(float_dtype(value))
    return gather(wide, self.keys) * self.shares[..., None]

  def weighted(self, weights: Float[Array, "*batch slices"]) -> "Couplings":
    """Every coupling times its weight."""
    return self._replace(shares=self.shares * weights[..., None])

  def choose(self, slices: Int[Array, "*batch"]) -> "Couplings":
    """Coupling of one slice alone."""
    at = slices[..., None, None]
    queries, keys, shares = jax.tree.map(
      lambda x: jnp.take_along_axis(x, at, axis=-2), self[:3]
    )
    return Couplings(queries, keys, shares, self.size)


def couple(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  directions: Float[Array, "heads slices dim"] | None = None,
  query_mask: Mask = None,
  key_mask: Mask = None,
  *,
  paired: bool = False,
) -> Couplings:
  """Optimal couplings of the projections along every direction.

  Valid queries carry one unit each, valid keys n_valid / m_valid; the others may hold
  any finite number. Directions are the coordinate axes by default. Ties keep their
  order. Works under jit and vmap; couplings are piecewise constant, so all gradients
  are zero.

  `paired` promises that n = m and that as many queries as keys are valid, so that
  couplings are permutations; without masks n = m is enough.

  Raises:
    ValueError: if `directions` do not fit, or n * m is 2^31 or more.
  """
  n, m = query.shape[-2], key.shape[-2]
  if n * m >= 2**31:
    raise ValueError(f"n * m = {n} * {m}: expected less than 2^31")
  x, y = (jax.lax.stop_gradient(project(points, directions)) for points in (query, key))
  order_x, order_y = ascending_order(x, query_mask), ascending_order(y, key_mask)
  shape = x.shape[:-1]
  if paired or (n == m and query_mask is None and key_mask is None):
    # One entry per query, in the order of the queries: values are gathered, not summed.
    rank = jnp.moveaxis(inverse(jnp.moveaxis(order_x, -1, 0)), 0, -1)
    keys = jnp.take_along_axis(order_y, rank, axis=-1)
    ones = jnp.ones((*shape, n), x.dtype)
    shares = ones if query_mask is None else query_mask[..., None, :] * ones
    return Couplings(None, keys, shares, (n, m))
  a, b = (
    jnp.int32(size) if mask is None else mask.sum(-1, dtype=jnp.int32)[..., None, None]
    for mask, size in ((query_mask, n), (key_mask, m))
  )
  # In units of 1 / (a b) of the mass, query i starts at i b and key j at j a: whole
  # numbers, so that starts which coincide are told from starts which nearly do. Between
  # two starts in a row lies one entry of the coupling, empty where they coincide.
  starts = [
    jnp.broadcast_to(
      jnp.minimum(jnp.arange(size, dtype=jnp.int32) * step, a * b), (*shape, size)
    )
    for size, step in ((n, b), (m, a))
  ]
  start = jnp.sort(jnp.concatenate(starts, axis=-1), axis=-1)
  length = jnp.diff(start, append=jnp.broadcast_to(a * b, (*shape, 1)), axis=-1)
  i, j = (
    jnp.minimum(start // jnp.maximum(step, 1), size - 1)
    for step, size in ((b, n), (a, m))
  )
  return Couplings(
    jnp.take_along_axis(order_x, i, axis=-1),
    jnp.take_along_axis(order_y, j, axis=-1),
    (length / jnp.maximum(b, 1)).astype(x.dtype),
    (n, m),
  )


def project(
  points: Float[Array, "*batch n dim"],
  directions: Float[Array, "heads slices dim"] | None,
) -> Float[Array, "*batch slices n"]:
  """Projections of `[..., heads, n, dim]`, on the coordinate axes by default.

  Raises:
    ValueError: if the directions are not of the points' heads and dimension.
  """
  if directions is None:
    return jnp.swapaxes(points, -1, -2)
  heads, _, dim = directions.shape
  if (heads, dim) != (points.shape[-3], points.shape[-1]):
    raise ValueError(
      f"directions have shape {directions.shape}: expected [{points.shape[-3]}, "
      f"slices, {points.shape[-1]}]"
    )
  return exact_einsum("...hnd,hld->...hln", points, directions)


def per_query(inputs: Inputs, total: Array) -> Array:
  """Total `[..., heads, slices]` over the number of valid queries."""
  mask = valid(inputs.query_mask)
  count = inputs.query.shape[-2] if mask is None else mask.sum(-1, keepdims=True)
  return total / jnp.maximum(count, 1)


def gather(
  values: Float[Array, "*batch m features"], index: Int[Array, "*batch slices entries"]
) -> Float[Array, "*batch slices entries features"]:
  """Rows of `[..., m, features]` at `[..., slices, entries]`."""
  rows = jnp.take_along_axis(values, _merge_slices(index)[..., None], axis=-2)
  return rows.reshape(*index.shape, values.shape[-1])


def ascending_order(x: Array, mask: Mask) -> Array:
  """Indices that sort `[..., slices, n]`, absent points last."""
  if mask is not None:
    x = jnp.where(mask[..., None, :], x, jnp.inf)
  return jnp.moveaxis(order_of(jnp.moveaxis(x, -1, 0)), 0, -1)


def _merge_slices(x: Array) -> Array:
  return x.reshape(*x.shape[:-2], -1)


def _segment_sum(values: Array, segments: Array, count: int) -> Array:
  """Sums of `[..., entries, features]` by segment: `[..., count, features]`."""
  batch, (entries, features) = values.shape[:-2], values.shape[-2:]
  sums = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=count))(
    values.reshape(-1, entries, features), segments.reshape(-1, entries)
  )
  return sums.reshape(*batch, count, features)
