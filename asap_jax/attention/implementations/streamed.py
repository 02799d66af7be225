"""Sinkhorn's iterations with their exact gradient in O(n + m) memory.

One sweep over the scores an iteration, forward and backward, a chunk of queries at a
time (`asap_jax.attention.implementations.sweeps`). The duals of all iterations are
kept, O(T (n + m)), and no n x m matrix.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations import sweeps, sweeps_back
from asap_jax.attention.implementations.blocks import block_size, by_blocks
from asap_jax.attention.implementations.sweeps import (
  Problem,
  Queries,
  in_chunks,
  joined,
)
from asap_jax.c_transform.entropic import Duals, check_closures, marginals
from asap_jax.c_transform.iterates import Iterates
from asap_jax.c_transform.segments import Segments
from asap_jax.masses import Masses, zero_invalid
from asap_jax.numerics import float_dtype, with_usual_promotion
from asap_jax.sizes import Size, is_known, known_behind

T = TypeVar("T")  # a pytree of arrays

# Of queries, keys, values, dual, sums of both, and segments of both: axes behind those
# of the batch.
_OWN = 2, 2, 2, 1, 1, 1, 1, 1
# Scores of a chunk: on a CPU they stay in its cache; elsewhere 32 MiB of float32, so
# that 8 heads of 16,384 tokens take less than 200 MB of an H100. Fewer heads at a time
# come before chunks of fewer queries, down to the least.
_CPU_SCORES, _CPU_LEAST_CHUNK = 2**20, 128
_SCORES, _LEAST_CHUNK = 2**23, 64
# Queries of a chunk where the length is not known.
_CHUNK = 256


def streamed_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  start: Float[Array, "*batch n"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  segments: Segments | None = None,
  tolerance: float | None = None,
  precision: jax.lax.PrecisionLike = None,
  forward: Float[Array, "*batch n features"] | None = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of plain iterations from a query-side dual.

  The same as `iterated_attention`, without a bias. Works under jit, vmap and grad, in
  reverse mode only.

  Args:
    query: see `iterated_attention`, as all arguments.
    key: likewise.
    value: likewise.
    start: likewise.
    iterations: likewise.
    query_weights: likewise.
    key_weights: likewise.
    segments: likewise.
    tolerance: likewise.
    precision: likewise.
    forward: likewise.

  Returns:
    As `iterated_attention`.
  """
  check_closures(iterations, None, None, "query")
  weights = query_weights, key_weights
  arguments = _arguments(query, key, value, start, *weights, segments)
  options = iterations, tolerance, precision
  return _attend(options, forward, *arguments)


def streamed_duals(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  start: Float[Array, "*batch n"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  segments: Segments | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Duals:
  """The last duals of plain iterations, for which no gradient is defined.

  Arguments are those of `streamed_attention`. Works under jit and vmap.
  """
  value = key[..., :1]  # of no interest, but the sweep has some
  weights = query_weights, key_weights
  arguments = _arguments(query, key, value, start, *weights, segments)
  arguments = jax.lax.stop_gradient(arguments)
  _, (_, kept) = _attend_and_keep((iterations, None, precision), *arguments)
  return kept[1]


def _arguments(query, key, value, start, query_weights, key_weights, segments):
  """What blocks are made of, absent points zero, with sums of rows and columns."""
  batch, n, m = query.shape[:-2], query.shape[-2], key.shape[-2]
  weights = query_weights, key_weights
  query, key, value = (
    zero_invalid(tokens, own, axis=-2)
    for tokens, own in ((query, weights[0]), (key, weights[1]), (value, weights[1]))
  )
  dtype = float_dtype(query, key, start)
  start = zero_invalid(start.astype(dtype), weights[0])
  a, b = marginals(*weights, (*batch, n, m), dtype)
  return query, key, value, start, a, b, *(segments or (None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, forward, *arguments):
  if forward is not None:
    return forward
  return _attend_and_keep(options, *arguments)[0]


def _attend_forward(options, forward, *arguments):
  del forward
  return _attend_and_keep(options, *arguments)


def _attend_and_keep(options, *arguments):
  def block(chunk, query, key, value, start, *rest):
    n = query.shape[-2]
    problem = _problem(chunk, query, key, *rest)
    start = in_chunks(start, chunk, axis=-1)
    swept = sweeps.iterate(problem, value.astype(problem.b.dtype), start, *options)
    iterates = swept.iterates._replace(f=_by_iteration(joined, swept.iterates.f, n))
    # Blocks have the batch in front.
    iterates = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), iterates)
    duals = swept.duals._replace(f=joined(swept.duals.f, n, axis=-1))
    return joined(swept.out, n, axis=-2), duals, iterates

  kept = _in_blocks(block, arguments, _OWN)
  # JAX (0.10) mixes up residuals that are inputs where it differentiates a loop twice.
  residuals = jax.lax.optimization_barrier((arguments, kept))
  return kept[0].astype(arguments[2].dtype), residuals


@with_usual_promotion
def backward(options, residuals, out_bar):
  """Cotangents of `_attend`'s arguments from the values' and what it kept."""

  def block(chunk, query, key, value, *rest):
    *sides, out, f, g, fs, gs, active, out_bar = rest
    n, dtype = query.shape[-2], f.dtype
    iterates = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), Iterates(fs, gs, active))
    iterates = iterates._replace(f=_by_iteration(in_chunks, iterates.f, chunk))
    duals = Duals(in_chunks(f, chunk, axis=-1), g)
    out, out_bar = (in_chunks(x.astype(dtype), chunk, axis=-2) for x in (out, out_bar))
    bars = sweeps_back.cotangents(
      _problem(chunk, query, key, *sides),
      value.astype(dtype),
      sweeps.Swept(out, duals, iterates),
      out_bar,
      options[-1],
    )
    return (
      joined(bars.query, n, axis=-2),
      bars.key,
      bars.value,
      *(joined(bar, n, axis=-1) for bar in (bars.start, bars.a)),
      bars.b,
    )

  arguments, (out, duals, iterates) = residuals
  query, key, value, _, *rest = arguments
  given = query, key, value, *rest, out, *duals, *iterates, out_bar
  own = (*_OWN[:3], *_OWN[4:], 2, 1, 1, 2, 2, 2, 2)
  found = _in_blocks(block, given, own)
  *moving, _, _ = arguments
  bars = (
    bar.astype(argument.dtype) for bar, argument in zip(found, moving, strict=True)
  )
  return None, *bars, None, None  # segments are none that moves


_attend.defvjp(_attend_forward, backward)


def _problem(chunk, query, key, a, b, query_segments, key_segments):
  ids = None
  if query_segments is not None:
    ids = in_chunks(query_segments, chunk, axis=-1)
  queries = Queries(in_chunks(query, chunk, axis=-2), ids)
  return Problem(queries, key, in_chunks(a, chunk, axis=-1), b, key_segments)


def _by_iteration(function: Callable[..., Array], duals: Array, size: Size) -> Array:
  return jax.vmap(lambda dual: function(dual, size, axis=-1))(duals)


def _in_blocks(
  function: Callable[..., T], arguments: Sequence[Any], own: Sequence[int]
) -> T:
  """`function` of the size of chunks, and of arguments in blocks of the batch."""
  query, key = arguments[:2]
  batch, n, m = query.shape[:-2], query.shape[-2], key.shape[-2]

  def run(scores, least, *arguments):
    if not is_known(n, m):
      return by_blocks(functools.partial(function, _CHUNK), batch, 1, arguments, own)
    most = max(scores // max(min(n, least) * m, 1), 1)
    elements = block_size(math.prod(known_behind(batch)), most)
    chunk = min(max(scores // max(elements * m, 1), 1), max(n, 1))
    # Chunks of one size, with as little in the last that is not there as can be.
    chunk = -(-n // -(-n // chunk))
    of_chunk = functools.partial(function, chunk)
    if is_known(*batch) and elements == math.prod(batch):
      return of_chunk(*arguments)
    return by_blocks(of_chunk, batch, elements, arguments, own)

  return jax.lax.platform_dependent(
    *arguments,
    cpu=functools.partial(run, _CPU_SCORES, _CPU_LEAST_CHUNK),
    default=functools.partial(run, _SCORES, _LEAST_CHUNK),
  )
