"""Sorting many short sequences of floats on a CPU: in which order their points come.

Arrays are `[points, sequences]` here: points stand along the first axis, so that one
vector instruction of a CPU compares the points of many sequences.

XLA's sort on a CPU takes ten times longer with an index beside the numbers. So points
are rounded to integers that hold their index in the low bits, and the integers sorted
alone; exchanges of neighbours then mend what rounding left in the wrong order. On a CPU
a bitonic network (Batcher, 1968, "Sorting networks and their applications") is many
times faster than XLA's sort: its stages are minima and maxima of all sequences at once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from asap_jax.sizes import at_most, is_known

# A network of more points takes longer to compile than it saves, as do fewer numbers
# in all, and with fewer sequences than lanes in a vector register it is not fast.
_MOST_POINTS = 4096
_LEAST_NUMBERS = 2**14
_LEAST_ROWS = 16
# Stages of the network that one loop runs: with more, XLA computes results many times
# over instead of storing them.
_STAGES = 2


def order_of(x: Float[Array, "n *batch"]) -> Int[Array, "n *batch"]:
  """Places of each sequence's points in ascending order; equal points by place.

  The result is that of `jnp.argsort(x, axis=0)`, many times faster on a CPU. Works
  under jit and vmap; the gradient is zero. Sequences that hold NaN come in any order.
  """
  return ascending(jax.lax.stop_gradient(x))[1]


# Reverse mode cannot pass the loop of the mending, and tangents need only the order.
@jax.custom_jvp
def ascending(
  x: Float[Array, "n *batch"],
) -> tuple[Float[Array, "n *batch"], Int[Array, "n *batch"]]:
  """Each sequence's points in ascending order, and their places as of `order_of`.

  Works under jit, vmap and grad.
  """
  n = x.shape[0]
  if not at_most(n, _MOST_POINTS) or not is_known(n):
    # Few bits would be left to tell points apart, or nobody knows how many.
    order = jnp.argsort(x, axis=0).astype(jnp.int32)
    return take(x, order), order
  order = (_sort(_packed(x)) & ((1 << _index_bits(n)) - 1)).astype(jnp.int32)
  return _mend(x, order)


@ascending.defjvp
def _ascending_jvp(primals, tangents):
  # In plain operations of the points: JAX drops this rule where it differentiates a
  # loop twice.
  order = ascending(jax.lax.stop_gradient(primals[0]))[1]
  values, moved = jax.jvp(lambda x: take(x, order), primals, tangents)
  still = np.zeros(order.shape, jax.dtypes.float0)
  return (values, order), (moved, still)


def take(
  values: Shaped[Array, "n *batch"], places: Int[Array, "k *batch"]
) -> Shaped[Array, "k *batch"]:
  """Points of each sequence at these places."""
  return jnp.take_along_axis(values, places, axis=0, mode="promise_in_bounds")


def places_of(x: Shaped[Array, "n *batch"]) -> Int[Array, "n *ones"]:
  """Places 0, 1, ... of the points, with axes of size one for the sequences."""
  return jnp.arange(x.shape[0], dtype=jnp.int32).reshape(-1, *(1,) * (x.ndim - 1))


def inverse(
  order: Int[Array, "n *batch"], places: Int[Array, "n *batch"] | None = None
) -> Int[Array, "n *batch"]:
  """Inverse of each sequence's permutation: where each point went.

  With `places`, the label that stands there: places[inverse(order)].
  """
  places = places_of(order) if places is None else places
  places = jnp.broadcast_to(places, order.shape).astype(order.dtype)
  columns = order.reshape(order.shape[0], -1)
  width = columns.shape[1]
  flat = (columns * width + jnp.arange(width, dtype=order.dtype)).reshape(-1)
  found = jnp.zeros_like(flat).at[flat]
  return found.set(
    places.reshape(-1), unique_indices=True, mode="promise_in_bounds"
  ).reshape(order.shape)


def first_of_equals(ordered: Float[Array, "n *batch"]) -> Int[Array, "n *batch"]:
  """First place that holds the same number, for each place of an ascending sequence.

  Infinite numbers are the same as none: absent points are no run of equals.
  """
  ordered = jax.lax.stop_gradient(ordered)
  tied = (ordered[1:] == ordered[:-1]) & jnp.isfinite(ordered[1:])
  tied = jnp.pad(tied, [(1, 0)] + [(0, 0)] * (tied.ndim - 1))
  place = jnp.broadcast_to(places_of(ordered), ordered.shape)

  def step(carry):
    place, _ = carry
    before = jnp.where(tied, jnp.roll(place, 1, axis=0), place)
    return before, (before != place).any()

  # As many turns as the longest run: none, as a rule, where a scan would cost the sort.
  return jax.lax.while_loop(lambda carry: carry[1], step, (place, tied.any()))[0]


def _index_bits(n: int) -> int:
  return max(n - 1, 0).bit_length()


def _packed(x: Array) -> Array:
  """Integers in the order of `x` up to rounding, with the index in the low bits.

  The index makes every integer unique, so that equal points keep their order and any
  sort is a stable one.
  """
  n, bits = x.shape[0], 8 * x.dtype.itemsize
  finite = jnp.isfinite(x)
  # Levels span each sequence's own range: none of them is lost to other sequences.
  least = jnp.min(x, axis=0, where=finite, initial=jnp.inf)
  largest = jnp.max(x, axis=0, where=finite, initial=-jnp.inf)
  least = jnp.where(finite.any(0), least, 0.0)  # no difference is to be NaN
  spread = largest - least
  # One bit for the sign, one for what rounding adds.
  levels = 2.0 ** (bits - 2 - _index_bits(n))
  level = (x - least) * (levels / jnp.where(spread > 0, spread, 1.0))
  level = jnp.where(finite, jnp.clip(level, 0.0, levels), jnp.where(x > 0, levels, 0.0))
  keys = level.astype(jnp.dtype(f"int{bits}")) << _index_bits(n)
  return keys | places_of(x).astype(keys.dtype)


def _sort(keys: Array) -> Array:
  n, sequences = keys.shape[0], math.prod(keys.shape[1:])
  sort = functools.partial(jax.lax.sort, dimension=0, is_stable=False)
  # Of a batch that is not known one hopes for many.
  is_few = at_most(sequences, _LEAST_ROWS - 1)
  if not is_few and not at_most(sequences * n, _LEAST_NUMBERS - 1):
    return jax.lax.platform_dependent(keys, cpu=bitonic_sort, default=sort)
  return sort(keys)


def _mend(x: Array, order: Array) -> tuple[Array, Array]:
  """Exchanges neighbours until all sequences ascend: seldom more than a turn or two.

  Only points that share a level are out of order, and those are few and side by side;
  where an outlier takes all levels for itself, it is still right, only slower.
  """

  def turn(carry):
    return _exchange_neighbours(_exchange_neighbours(carry, 0), 1)

  return jax.lax.while_loop(_descends, turn, (take(x, order), order))


def _exchange_neighbours(carry: tuple[Array, Array], first: int) -> tuple[Array, Array]:
  """Points with every pair of neighbours in order, counted from the place `first`."""
  values, order = carry
  last = first + (values.shape[0] - first) // 2 * 2
  left, right = (slice(first + side, last, 2) for side in (0, 1))
  exchanged = values[left] > values[right]

  def exchange(of):
    small = jnp.where(exchanged, of[right], of[left])
    great = jnp.where(exchanged, of[left], of[right])
    inside = jnp.stack([small, great], axis=1).reshape(-1, *of.shape[1:])
    return jnp.concatenate([of[:first], inside, of[last:]])

  return exchange(values), exchange(order)


def _descends(carry: tuple[Array, Array]) -> Bool[Array, ""]:
  values, _ = carry
  return (values[1:] < values[:-1]).any()


@jax.jit
def bitonic_sort(keys: Int[Array, "n *batch"]) -> Int[Array, "n *batch"]:
  """Integers sorted along the first axis, by a network.

  Which points are compared does not depend on their values, so that nothing branches
  and all sequences go through the stages together.
  """
  n, *batch = keys.shape
  bits = _index_bits(n)
  largest = jnp.iinfo(keys.dtype).max
  keys = jnp.pad(
    keys.reshape(n, -1), ((0, (1 << bits) - n), (0, 0)), constant_values=largest
  )
  for merge in range(1, bits + 1):  # of sorted runs, two and two
    left, mirrored = merge, True
    while left:
      count = min(left, _STAGES)
      keys = _exchange(keys, 1 << left, count, mirrored=mirrored)
      left, mirrored = left - count, False
  return keys[:n].reshape(n, *batch)


def _exchange(keys: Array, block: int, count: int, *, mirrored: bool) -> Array:
  """`count` stages: smaller keys to the first half of each block, then of each half.

  Mirrored, the first stage reads the second half backwards, since both halves ascend;
  it leaves that half's pieces backwards inside, which the stages after it put right.
  """
  shape, ways = keys.shape, 1 << count
  pieces = keys.reshape(-1, ways, block // ways, shape[1])
  parts = [pieces[:, place] for place in range(ways)]
  apart = ways // 2
  while apart:
    for place in range(ways):
      if not place & apart:
        other = ways - 1 - place if mirrored else place + apart
        small, great = parts[place], parts[other][:, :: -1 if mirrored else 1]
        parts[place] = jnp.minimum(small, great)
        parts[other] = jnp.maximum(small, great)
    apart, mirrored = apart // 2, False
  return jnp.stack(parts, axis=1).reshape(shape)


def search(
  ordered: Shaped[Array, "n *#batch"], values: Shaped[Array, "k *#batch"]
) -> Int[Array, "k *batch"]:
  """Number of points of each ascending sequence that are below each of the values."""
  batch = jnp.broadcast_shapes(ordered.shape[1:], values.shape[1:])
  ordered, values = (
    jnp.broadcast_to(x, (x.shape[0], *batch)).reshape(x.shape[0], -1)
    for x in (ordered, values)
  )
  found = jax.vmap(jnp.searchsorted, 1, 1)(ordered, values)
  return found.reshape(found.shape[0], *batch)
