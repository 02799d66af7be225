"""Sorting many short rows of floats, and where each point went.

Floats sort as integers here: XLA's comparison of floats, and carrying an index along,
cost a CPU several times the sort. On a CPU a bitonic network (Batcher, 1968, "Sorting
networks and their applications") is several times faster still: each of its stages is a
minimum and a maximum over all rows at once.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

# A network of more points takes longer to compile than it saves, as do fewer numbers
# in all, and with fewer rows than lanes in a vector register it is not fast.
_MOST_POINTS = 4096
_LEAST_NUMBERS = 2**14
_LEAST_ROWS = 16


def integer_keys(x: Float[Array, "..."]) -> Int[Array, "..."]:
  """Integers in the order of the floats `x`; equal floats give equal integers."""
  x = jax.lax.stop_gradient(x) + 0.0  # no negative zero
  return _flip_negative(
    jax.lax.bitcast_convert_type(x, jnp.dtype(f"int{8 * x.dtype.itemsize}"))
  )


@jax.custom_jvp
def ascending(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
  """`x` sorted along its last axis, NaN last. Works under jit, vmap and grad."""
  keys = integer_keys(x)
  n, rows = x.shape[-1], math.prod(x.shape[:-1])
  sort = functools.partial(jax.lax.sort, is_stable=False)
  if n <= _MOST_POINTS and rows >= _LEAST_ROWS and rows * n >= _LEAST_NUMBERS:
    keys = jax.lax.platform_dependent(keys, cpu=bitonic_sort, default=sort)
  else:
    keys = sort(keys)
  return jax.lax.bitcast_convert_type(_flip_negative(keys), x.dtype)


@ascending.defjvp
def _ascending_jvp(primals, tangents):
  order = jnp.argsort(primals[0], axis=-1)
  return tuple(jnp.take_along_axis(x[0], order, axis=-1) for x in (primals, tangents))


def ascending_pair(
  x: Float[Array, "*batch n"], y: Float[Array, "*batch2 m"]
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch2 m"]]:
  """`ascending` of both, by one sort where the rows are of one length."""
  n, m = x.shape[-1], y.shape[-1]
  if n != m:
    return ascending(x), ascending(y)
  rows = math.prod(x.shape[:-1])
  both = ascending(jnp.concatenate([x.reshape(-1, n), y.reshape(-1, n)]))
  return both[:rows].reshape(x.shape), both[rows:].reshape(y.shape)


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


def _flip_negative(bits: Array) -> Array:
  return bits ^ ((bits >> (8 * bits.dtype.itemsize - 1)) & jnp.iinfo(bits.dtype).max)
