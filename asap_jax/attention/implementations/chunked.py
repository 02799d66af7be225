"""Doubly stochastic attention from a query-side dual in O(n + m) memory.

In the log domain, one chunk of points at a time: a dual of the key side needs, for each
key, one log-sum-exp over all queries, so chunks of keys need nothing of one another,
and chunks of queries likewise. The last half-iteration is an ordinary softmax over keys
with a bias per key, and gives the values of a chunk of queries at once. The backward
pass computes each chunk anew, so that it too holds one chunk at a time (Chen et al.,
2016, "Training deep nets with sublinear memory cost").
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations.blocks import block_size
from asap_jax.c_transform.entropic import (
  LOG_ZERO,
  advance,
  by_closure,
  check_closures,
  marginals,
)
from asap_jax.c_transform.segments import Segments
from asap_jax.masses import Masses, Side, check_weights, zero_invalid
from asap_jax.numerics import float_dtype, logits_einsum
from asap_jax.sizes import Size, at_most, is_known

# Scores computed at a time: on a CPU they stay in its cache; elsewhere 32 MiB of
# float32, so that 8 heads of 16,384 tokens take less than 200 MB of an H100.
_CPU_BUDGET = 2**20
_BUDGET = 2**23
# A chunk of fewer points is a slow matrix product: fewer heads at a time come first.
_LEAST_CHUNK = 64
# Points of a chunk where the length is not known.
_CHUNK = 256


class _Problem(NamedTuple):
  """Arguments of one attention, broadcast to `[batch..., ...]`, absent points zero."""

  query: Array
  key: Array
  value: Array
  dual: Array
  rows: Array  # sums of the plan's rows, zero at absent queries
  columns: Array  # likewise
  relaxation: Array | None
  momentum: Array | None
  bias: Array | None  # `[batch or 1..., n or 1, m or 1]`
  query_segments: Array | None = None
  key_segments: Array | None = None


def chunked_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  dual: Float[Array, "..."],
  count: int = 1,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  bias: Float[Array, "..."] | None = None,
  segments: Segments | None = None,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures from f, in O(n + m) memory.

  The same function as `scaled_attention`, forward and backward without
  an n x m matrix, at the price of an exponential for every half-iteration. From f = 0
  it is Sinkhorn cut to `count` iterations, streamed. Works under jit, vmap and grad, in
  forward mode and to second order too; reverse mode of several closures keeps the dual
  of each, O(count n), and nothing else.

  Args:
    query: see `scaled_attention`, as all arguments not listed here.
    key: likewise.
    value: likewise.
    dual: likewise.
    count: likewise.
    query_weights: likewise.
    key_weights: likewise.
    bias: likewise; read chunk by chunk and never broadcast.
    segments: likewise.
    relaxation: likewise.
    momentum: likewise.
    side: likewise.
    precision: likewise.

  Returns:
    As `scaled_attention`.

  Raises:
    ValueError: as `scaled_attention`.
  """
  check_closures(count, relaxation, momentum, side)
  n, m = query.shape[-2], key.shape[-2]
  check_weights("query_weights", query_weights, n)
  check_weights("key_weights", key_weights, m)
  batch = query.shape[:-2]
  dtype = float_dtype(query, key, dual)
  rows, columns = marginals(query_weights, key_weights, (*batch, n, m), dtype)
  relaxation, momentum = jax.tree.map(
    lambda x: jnp.broadcast_to(x.astype(dtype), (*batch, max(count - 1, 0))),
    (relaxation, momentum),
  )
  own_weights, size = (query_weights, n) if side == "query" else (key_weights, m)
  dual = zero_invalid(dual.astype(dtype), own_weights)
  if bias is not None:
    bias = bias.reshape((1,) * (len(batch) + 2 - bias.ndim) + bias.shape)
  problem = _Problem(
    query=zero_invalid(query, query_weights, axis=-2),
    key=zero_invalid(key, key_weights, axis=-2),
    value=zero_invalid(value, key_weights, axis=-2),
    dual=jnp.broadcast_to(dual, (*batch, size)),
    rows=rows,
    columns=columns,
    relaxation=relaxation,
    momentum=momentum,
    bias=bias,
  )
  if segments is not None:
    problem = problem._replace(
      query_segments=jnp.broadcast_to(segments.query, (*batch, n)),
      key_segments=jnp.broadcast_to(segments.key, (*batch, m)),
    )
  attend = functools.partial(_attend, count=count, side=side, precision=precision)
  return jax.lax.platform_dependent(
    problem,
    cpu=functools.partial(attend, budget=_CPU_BUDGET),
    default=functools.partial(attend, budget=_BUDGET),
  )


def _attend(
  problem: _Problem,
  *,
  count: int,
  side: Side,
  precision: jax.lax.PrecisionLike,
  budget: int,
) -> Array:
  """`chunked_attention` with about `budget` scores at a time."""
  query, key, value, dual, rows, columns, relaxation, momentum, bias, *ids = problem
  batch, n, m = query.shape[:-2], query.shape[-2], key.shape[-2]
  if is_known(n, m):
    least = max(n, m) * min(max(n, m), _LEAST_CHUNK)
  else:
    least = budget  # one element of the batch at a time, whatever its length
  if batch and not at_most(math.prod(batch) * least, budget):
    options: dict[str, Any] = {
      "count": count,
      "side": side,
      "precision": precision,
      "budget": budget,
    }
    attend = functools.partial(_attend, **options)
    of_one = math.prod(batch[1:]) * least
    return _by_groups(attend, problem, budget // of_one if is_known(of_one) else 1)
  segments = _segments(*ids)
  by_chunks = functools.partial(_by_chunks, budget=budget // max(math.prod(batch), 1))

  def scores(chunk, positions, source, dual):
    """Of a chunk of one side with all points of the other: logits and their dual."""
    axis, points, here, there = (
      (-2, key, rows, columns) if source == "key" else (-1, query, columns, rows)
    )
    # Else JAX would take the logits, which no dual changes, out of a loop over closures
    # and hold them all.
    chunk, dual = jax.lax.optimization_barrier((chunk, dual))
    logits = logits_einsum(
      "...cd,...sd->...cs",
      chunk,
      points,
      precision=precision,
      preferred_element_type=rows.dtype,
    )
    if bias is not None:
      biases = bias if bias.shape[axis] == 1 else jnp.take(bias, positions, axis)
      biases = biases if axis == -2 else biases.swapaxes(-1, -2)
      # A bias between absent points may hold anything.
      pairs = (jnp.take(here, positions, -1) > 0)[..., None] & (there > 0)[..., None, :]
      logits = jnp.where(pairs, logits + biases, 0.0)
    if segments is not None:
      own, others = segments if source == "key" else segments[::-1]
      logits = logits + Segments(jnp.take(own, positions, -1), others).log_kernel
    return logits + jnp.where(there > 0, dual, LOG_ZERO)[..., None, :]

  def transform(dual, source):
    target, sums = (query, rows) if source == "key" else (key, columns)

    def log_sums(chunk, positions):
      each = scores(chunk, positions, source, dual)
      return jax.nn.logsumexp(each, axis=-1, keepdims=True)

    logs = by_chunks(log_sums, target, n if source == "query" else m)[..., 0]
    present = sums > 0
    return jnp.where(present, jnp.log(jnp.where(present, sums, 1.0)) - logs, 0.0)

  def step(carry, factors):
    f, before = carry
    closed = transform(transform(f, "query"), "key")
    return (advance(before, f, closed, *factors), f), None

  def values(chunk, positions):
    each = scores(chunk, positions, "key", g)
    weights = jnp.exp(each - jax.lax.stop_gradient(each.max(-1, keepdims=True)))
    # The range of float16 is too small for weights.
    dtype = jnp.float32 if value.dtype == jnp.float16 else value.dtype
    out = jnp.einsum(
      "...cm,...mv->...cv",
      weights.astype(dtype),
      value.astype(dtype),
      precision=precision,
      preferred_element_type=rows.dtype,
    )
    return out / weights.sum(-1, keepdims=True)

  g = dual
  f = dual if side == "query" else transform(g, "key")
  if count > 1:
    factors = by_closure(relaxation, momentum, rows.dtype)
    (f, _), _ = jax.lax.scan(step, (f, f), factors, length=count - 1)
  if count > 0:
    g = transform(f, "query")
  out = by_chunks(values, query, m)
  return jnp.where(rows[..., None] > 0, rows[..., None] * out, 0.0).astype(value.dtype)


def _segments(query: Array | None, key: Array | None) -> Segments | None:
  return None if query is None or key is None else Segments(query, key)


def _by_chunks(
  function: Callable[[Array, Array], Array], points: Array, others: Size, *, budget: int
) -> Array:
  """`function` of points `[..., size, dim]` and their positions, a chunk at a time.

  A chunk has at most `budget` scores with the points of the other side.
  """
  size = points.shape[-2]
  chunk = max(budget // max(others, 1), _LEAST_CHUNK) if is_known(others) else _CHUNK
  chunk = min(chunk, size) if is_known(size) else chunk
  # The backward pass computes the chunk anew.
  function = jax.checkpoint(function, prevent_cse=False)
  chunks = -(-size // max(chunk, 1))
  if at_most(chunks, 1):
    return function(points, jnp.arange(size))
  if is_known(chunks):
    chunk = -(-size // chunks)
  surplus = chunks * chunk - size
  # Surplus points are zeros, their positions those of the last; they are cut off.
  edges = [(0, 0, 0)] * (points.ndim - 2) + [(0, surplus, 0), (0, 0, 0)]
  points = jax.lax.pad(points, jnp.zeros((), points.dtype), edges)
  positions = jnp.minimum(jnp.arange(points.shape[-2]), size - 1).reshape(-1, chunk)
  batch = points.shape[:-2]
  points = points.reshape(*batch, -1, chunk, points.shape[-1])
  out = jax.lax.map(
    lambda each: function(*each), (jnp.moveaxis(points, -3, 0), positions)
  )
  out = jnp.moveaxis(out, 0, -3).reshape(*batch, -1, out.shape[-1])
  return out[..., :size, :]


def _by_groups(
  function: Callable[[_Problem], Array], problem: _Problem, most: int
) -> Array:
  """`function` of at most `most` of the leading batch axis at a time."""
  total = problem.query.shape[0]
  group = block_size(total, most) if is_known(total) else 1

  def split(array):
    return array if group == 1 else array.reshape(-1, group, *array.shape[1:])

  bias = problem.bias
  shared = bias if bias is not None and bias.shape[0] == 1 else None
  grouped = jax.tree.map(split, problem._replace(bias=bias if shared is None else None))

  # Nothing of a group but its arguments is kept for the backward pass.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def attend(grouped):
    if shared is not None:
      grouped = grouped._replace(bias=shared if group > 1 else shared[0])
    return function(grouped)

  out = jax.lax.map(attend, grouped)
  return out.reshape(total, *out.shape[1 if group == 1 else 2 :])
