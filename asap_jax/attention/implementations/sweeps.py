r"""Sinkhorn's iterations by sweeps over chunks of queries, without an n x m matrix.

A chunk of queries gets its f from g, and adds at once what it gives to the sums of the
columns, from which the next g follows. So an iteration takes one exponential of a pair
of tokens, where its two halves, one after the other, take two.

The way back is in `asap_jax.attention.implementations.sweeps_back`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.c_transform.entropic import LOG_ZERO, Duals
from asap_jax.c_transform.half_closure import sums_in_range
from asap_jax.c_transform.iterates import Iterates, column_shift
from asap_jax.c_transform.segments import Segments
from asap_jax.numerics import exact_einsum, logits_einsum
from asap_jax.sizes import Size
from asap_jax.teacher.gradient import by_domain, divide


class Queries(NamedTuple):
  """Queries, all of them in chunks, or a chunk.

  Attributes:
    tokens: `[..., dim]`.
    segments: of packed sequences, `[...]`, or `None`.
  """

  tokens: Array
  segments: Array | None = None


class Problem(NamedTuple):
  """Tokens whose products are logits, and the sums of the plan; queries in chunks.

  All that belongs to queries has its chunks in front, and is zero where they are
  absent.

  Attributes:
    query: tokens `[chunks, batch..., chunk, dim]`.
    key: `[batch..., m, dim]`.
    a: sums of the rows, `[chunks, batch..., chunk]`, zero at absent queries.
    b: sums of the columns, `[batch..., m]`, likewise.
    key_segments: of packed sequences, `[batch..., m]`, or `None`.
  """

  query: Queries
  key: Array
  a: Array
  b: Array
  key_segments: Array | None = None


def in_chunks(array: Array, size: Size, *, axis: int) -> Array:
  """Chunks of an axis (negative) in front, `[chunks, ..., size, ...]`.

  What the last one has too much is zero, as an absent query.
  """
  axis += array.ndim
  surplus = -(-array.shape[axis] // size) * size - array.shape[axis]
  edges = [(0, surplus if i == axis else 0, 0) for i in range(array.ndim)]
  array = jax.lax.pad(array, jnp.zeros((), array.dtype), edges)
  split = array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])
  return jnp.moveaxis(split, axis, 0)


def joined(chunks: Array, length: Size, *, axis: int) -> Array:
  """`in_chunks`, undone."""
  axis += chunks.ndim - 1
  array = jnp.moveaxis(chunks, 0, axis)
  array = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
  return jax.lax.slice_in_dim(array, 0, length, axis=axis)


class Swept(NamedTuple):
  """What iterations gave, and what their gradient needs; f in chunks.

  Attributes:
    out: values under the plan, `[chunks, batch..., chunk, features]`.
    duals: at last.
    iterates: of all iterations.
  """

  out: Array
  duals: Duals
  iterates: Iterates


def iterate(
  problem: Problem,
  value: Array,
  start: Array,
  iterations: int,
  tolerance: float | None,
  precision: jax.lax.PrecisionLike,
) -> Swept:
  """Values under the plan of plain iterations.

  Args:
    problem: of one attention.
    value: `[batch..., m, features]`, float32 or better.
    start: f, `[chunks, batch..., chunk]`.
    iterations: at least one; with a tolerance at most so many.
    tolerance: see `asap_jax.c_transform.iterates.scaled_iterates`.
    precision: of the products with keys and values.
  """
  scores = functools.partial(scores_of, problem, precision)
  g = _keys_dual(problem, precision, start)

  def turn(f, g, active):
    def rows(sums, chunk):
      query, a = chunk
      kernel, scaling, f = _row_fit(scores(query, g), a)
      return sums + to_columns(kernel, scaling), f

    sums, f = jax.lax.scan(rows, jnp.zeros_like(g), (problem.query, problem.a))
    largest = problem.a.max((0, -1))[..., None]
    length = problem.a.shape[0] * problem.a.shape[-1]
    in_range = sums_in_range(sums, largest, problem.b, length)
    function = functools.partial(_next_dual, precision)
    after = by_domain(function, in_range, problem, f, g, sums)
    if tolerance is not None:
      active = active & (column_shift(g, after, problem.b)[..., None] > tolerance)
      after = jnp.where(active, after, g)
    reached = Iterates(f, after, active)
    return reached, reached

  def step(carry, _):
    if tolerance is None:
      return turn(*carry)
    active = carry[-1]
    return jax.lax.cond(
      active.any(), turn, lambda *same: (Iterates(*same),) * 2, *carry
    )

  active = None if tolerance is None else jnp.ones((*g.shape[:-1], 1), bool)
  carry = first = Iterates(start, g, active)
  (_, g, _), later = jax.lax.scan(step, carry, length=iterations - 1)
  iterates = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, later)

  def values(_, chunk):
    query, a = chunk
    kernel, scaling, f = _row_fit(scores(query, g), a)
    out = jnp.einsum("...cm,...mv->...cv", kernel, value, precision=precision)
    return None, (scaling[..., None] * out, f)

  _, (out, f) = jax.lax.scan(values, None, (problem.query, problem.a))
  return Swept(out, Duals(f, g), iterates)


def scores_of(problem: Problem, precision: Any, query: Queries, g: Array) -> Array:
  """Logits of a chunk of queries and g, far below all others at absent keys."""
  return _logits(problem, precision, query) + absent_low(g, problem.b)[..., None, :]


def _logits(problem: Problem, precision: Any, query: Queries) -> Array:
  logits = logits_einsum(
    "...cd,...md->...cm", query.tokens, problem.key, precision=precision
  )
  if query.segments is None or problem.key_segments is None:
    return logits
  return logits + Segments(query.segments, problem.key_segments).log_kernel


def _row_fit(scores: Array, a: Array) -> tuple[Array, Array, Array]:
  """Kernel, scaling and f of a chunk whose rows are to have the sums a."""
  largest = scores.max(-1, keepdims=True)
  kernel = jnp.exp(scores - largest)
  totals = kernel.sum(-1)
  return (
    kernel,
    divide(a, totals),
    jnp.where(a > 0, _log(a / totals) - largest[..., 0], 0.0),
  )


def _keys_dual(problem: Problem, precision: Any, f: Array) -> Array:
  """The c-transform of f: log-sum-exp over all chunks."""

  def add(carry, chunk):
    largest, sums = carry
    query, a, f = chunk
    scores = _logits(problem, precision, query) + absent_low(f, a)[..., None]
    new = jnp.maximum(largest, scores.max(-2))
    own = jnp.exp(scores - new[..., None, :]).sum(-2)
    return (new, sums * jnp.exp(largest - new) + own), None

  start = jnp.full_like(problem.b, LOG_ZERO), jnp.zeros_like(problem.b)
  (largest, sums), _ = jax.lax.scan(add, start, (problem.query, problem.a, f))
  return jnp.where(problem.b > 0, _log(problem.b) - largest - _log(sums), 0.0)


def _next_dual(precision, in_range, problem, f, g, sums):
  """The c-transform of f, where the columns of f and g have these sums."""
  if not in_range:
    return _keys_dual(problem, precision, f)
  return jnp.where(problem.b > 0, g + _log(problem.b) - _log(sums), 0.0)


def absent_low(dual: Array, marginal: Array) -> Array:
  """A dual that leaves no mass where there is none in the marginal."""
  return jnp.where(marginal > 0, dual, LOG_ZERO)


def _log(sums: Array) -> Array:
  return jnp.log(jnp.where(sums > 0, sums, 1.0))


def to_columns(kernel: Array, vector: Array) -> Array:
  """What a chunk of queries gives to the columns."""
  return exact_einsum("...cm,...c->...m", kernel, vector)
