"""Sorting many short rows of floats: in which order their points come.

Carrying an index along costs XLA's sort on a CPU ten times the sort. Points are rounded
to integers that hold their index in the low bits, therefore, and those sorted alone;
what the rounding left in the wrong order is mended by exchanges of neighbours. On a CPU
a bitonic network (Batcher, 1968, "Sorting networks and their applications") is several
times faster than XLA's sort: each of its stages is a minimum and a maximum over all
rows at once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

# A network of more points takes longer to compile than it saves, as do fewer numbers
# in all, and with fewer rows than lanes in a vector register it is not fast.
_MOST_POINTS = 4096
_LEAST_NUMBERS = 2**14
_LEAST_ROWS = 16


def order_of(x: Float[Array, "*batch n"]) -> Int[Array, "*batch n"]:
  """The places of each row's points in ascending order; equal points by place.

  What `jnp.argsort` gives, several times faster on a CPU. Works under jit and vmap; the
  gradient is zero. Rows that hold NaN come in any order.
  """
  return ascending(jax.lax.stop_gradient(x))[1]


@jax.custom_jvp
def ascending(
  x: Float[Array, "*batch n"],
) -> tuple[Float[Array, "*batch n"], Int[Array, "*batch n"]]:
  """Each row's points in ascending order, and their places as of `order_of`.

  Works under jit, vmap and grad.
  """
  n = x.shape[-1]
  if n > _MOST_POINTS:  # few bits would be left to tell points apart
    order = jnp.argsort(x, axis=-1).astype(jnp.int32)
    return _take(x, order), order
  order = (_sort(_packed(x)) & ((1 << _index_bits(n)) - 1)).astype(jnp.int32)
  return _mend(x, order)


@ascending.defjvp
def _ascending_jvp(primals, tangents):
  values, order = ascending(*primals)
  still = np.zeros(order.shape, jax.dtypes.float0)
  return (values, order), (_take(tangents[0], order), still)


def inverse(
  order: Int[Array, "*batch n"], places: Int[Array, "*batch n"] | None = None
) -> Int[Array, "*batch n"]:
  """The inverse of each row's permutation: where each point went.

  Or, given `places`, what stands there in them: places[inverse(order)].
  """
  *batch, n = order.shape
  rows = order.reshape(-1, n)
  flat = (rows + n * jnp.arange(rows.shape[0], dtype=order.dtype)[:, None]).reshape(-1)
  if places is None:
    places = jnp.broadcast_to(jnp.arange(n, dtype=order.dtype), rows.shape)
  found = jnp.zeros_like(flat).at[flat]
  return found.set(
    places.reshape(-1).astype(order.dtype),
    unique_indices=True,
    mode="promise_in_bounds",
  ).reshape(*batch, n)


def first_of_equals(ordered: Float[Array, "*batch n"]) -> Int[Array, "*batch n"]:
  """For each place of an ascending row, the first place that holds the same number."""
  ordered = jax.lax.stop_gradient(ordered)
  tied = ordered[..., 1:] == ordered[..., :-1]
  tied = jnp.pad(tied, [(0, 0)] * (tied.ndim - 1) + [(1, 0)])
  place = jnp.broadcast_to(jnp.arange(ordered.shape[-1]), ordered.shape)

  def step(carry):
    place, _ = carry
    before = jnp.where(tied, jnp.roll(place, 1, axis=-1), place)
    return before, (before != place).any()

  # As many turns as the longest run: none, as a rule, where a scan would cost the sort.
  return jax.lax.while_loop(lambda carry: carry[1], step, (place, tied.any()))[0]


def _index_bits(n: int) -> int:
  return max(n - 1, 0).bit_length()


def _packed(x: Array) -> Array:
  """Integers in the order of `x` up to rounding, with the index in the low bits."""
  n, bits = x.shape[-1], 8 * x.dtype.itemsize
  finite = jnp.isfinite(x)
  least = jnp.min(x, axis=-1, keepdims=True, where=finite, initial=jnp.inf)
  largest = jnp.max(x, axis=-1, keepdims=True, where=finite, initial=-jnp.inf)
  spread = largest - least
  # One bit for the sign, one for what rounding adds.
  levels = 2.0 ** (bits - 2 - _index_bits(n))
  level = (x - least) * (levels / jnp.where(spread > 0, spread, 1.0))
  level = jnp.where(finite, jnp.clip(level, 0.0, levels), jnp.where(x > 0, levels, 0.0))
  keys = level.astype(jnp.dtype(f"int{bits}"))
  return (keys << _index_bits(n)) | jnp.arange(n, dtype=keys.dtype)


def _sort(keys: Array) -> Array:
  rows, n = math.prod(keys.shape[:-1]), keys.shape[-1]
  sort = functools.partial(jax.lax.sort, is_stable=False)
  if rows >= _LEAST_ROWS and rows * n >= _LEAST_NUMBERS:
    return jax.lax.platform_dependent(keys, cpu=bitonic_sort, default=sort)
  return sort(keys)


def _mend(x: Array, order: Array) -> tuple[Array, Array]:
  """Exchanges neighbours until all rows ascend: seldom more than a turn or two."""
  even = jnp.arange(x.shape[-1]) % 2 == 0

  def exchange(carry, first):
    values, _ = carry
    greater = values[..., :-1] > values[..., 1:]
    last = [(0, 0)] * (values.ndim - 1)
    ahead = jnp.pad(greater, [*last, (0, 1)]) & first
    behind = jnp.roll(ahead, 1, axis=-1)
    return tuple(
      jnp.where(ahead, jnp.roll(of, -1, -1), jnp.where(behind, jnp.roll(of, 1, -1), of))
      for of in carry
    )

  def turn(carry):
    return exchange(exchange(carry, even), ~even)

  return jax.lax.while_loop(_descends, turn, (_take(x, order), order))


def _take(values: Array, index: Array) -> Array:
  return jnp.take_along_axis(values, index, axis=-1, mode="promise_in_bounds")


def _descends(carry: tuple[Array, Array]) -> Bool[Array, ""]:
  values, _ = carry
  return (values[..., 1:] < values[..., :-1]).any()


@jax.jit
def bitonic_sort(keys: Int[Array, "*batch n"]) -> Int[Array, "*batch n"]:
  """Integers sorted along the last axis, by a network with the rows side by side."""
  *batch, n = keys.shape
  keys = keys.reshape(-1, n).T
  size = 1 << max(n - 1, 0).bit_length()
  largest = jnp.iinfo(keys.dtype).max
  keys = jnp.pad(keys, ((0, size - n), (0, 0)), constant_values=largest)
  run = 2
  while run <= size:  # merges sorted runs of half the length
    # The second run of a pair read backwards: the first half holds the smaller ones.
    keys = _exchange(keys, run, mirrored=True)
    apart = run // 4
    while apart:
      keys = _exchange(keys, 2 * apart, mirrored=False)
      apart //= 2
    run *= 2
  return keys[:n].T.reshape(*batch, n)


def _exchange(keys: Array, block: int, *, mirrored: bool) -> Array:
  """Smaller keys to the first half of each block, greater ones to the second."""
  shape = keys.shape
  pairs = keys.reshape(-1, 2, block // 2, shape[1])
  first, second = pairs[:, 0], pairs[:, 1]
  if mirrored:
    second = second[:, ::-1]
  small, great = jnp.minimum(first, second), jnp.maximum(first, second)
  if mirrored:
    great = great[:, ::-1]
  return jnp.stack([small, great], axis=1).reshape(shape)


def search(
  ordered: Shaped[Array, "*#batch n"], values: Shaped[Array, "*#batch k"]
) -> Int[Array, "*batch k"]:
  """How many of each ascending row are below each of the values of that row.

  Bisection in log2(n) steps, for all rows and values at once.
  """
  n = ordered.shape[-1]
  batch = jnp.broadcast_shapes(ordered.shape[:-1], values.shape[:-1])
  ordered = jnp.broadcast_to(ordered, (*batch, n))
  found = jnp.zeros((*batch, values.shape[-1]), jnp.int32)
  step = (1 << n.bit_length()) >> 1
  while step:
    reach = found + step
    at = jnp.minimum(reach, n) - 1
    probe = jnp.take_along_axis(ordered, at, axis=-1, mode="promise_in_bounds")
    found = jnp.where((probe < values) & (reach <= n), reach, found)
    step //= 2
  return found
