r"""Sinkhorn's iterations by sweeps over chunks of queries, without an n x m matrix.

A chunk of queries gets its f from g, and adds at once what it gives to the sums of the
columns, from which the next g follows. So an iteration takes one exponential of a pair
of tokens, where its two halves, one after the other, take two.

The way back takes one sweep an iteration as well. With the plan between the halves of
iteration t, $Q_t = \exp(S + f_{t-1} + g_t)$, and bars for cotangents,

$$\bar f_{t-1} = -Q_t\,(\bar g_t / b), \qquad
\bar g_{t-1} = -e^{g_{t-1} - g_t}\, Q_t^T (\bar f_{t-1} / a):$$

a chunk of queries takes the first, and adds at once what it gives to the second. The
factor in front is at most the sum of a plan over the least b, whatever the logits: it
cannot leave the range of float32 as the factors between distant iterates can.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.c_transform.entropic import LOG_ZERO, Duals
from asap_jax.c_transform.half_closure import sums_in_range
from asap_jax.c_transform.iterates import Iterates, column_shift
from asap_jax.numerics import exact_einsum
from asap_jax.teacher.gradient import LOG_RANGE, by_domain, divide


class Problem(NamedTuple):
  """Tokens whose products are logits, and the sums of the plan; queries in chunks.

  All that belongs to queries has its chunks in front, and is zero where they are
  absent.

  Attributes:
    query: `[chunks, batch..., chunk, dim]`.
    key: `[batch..., m, dim]`.
    a: sums of the rows, `[chunks, batch..., chunk]`, zero at absent queries.
    b: sums of the columns, `[batch..., m]`, likewise.
  """

  query: Array
  key: Array
  a: Array
  b: Array


def in_chunks(array: Array, size: int, *, axis: int) -> Array:
  """Chunks of an axis (negative) in front, `[chunks, ..., size, ...]`.

  What the last one has too much is zero, as an absent query.
  """
  axis += array.ndim
  surplus = -array.shape[axis] % size
  array = jnp.pad(array, [(0, surplus * (i == axis)) for i in range(array.ndim)])
  split = array.reshape(*array.shape[:axis], -1, size, *array.shape[axis + 1 :])
  return jnp.moveaxis(split, axis, 0)


def joined(chunks: Array, length: int, *, axis: int) -> Array:
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


class Cotangents(NamedTuple):
  """Of the arguments of `iterate`, in their layout."""

  query: Array
  key: Array
  value: Array
  start: Array
  a: Array
  b: Array


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
  scores = functools.partial(_scores, problem, precision)
  g = _keys_dual(problem, precision, start)

  def turn(f, g, active):
    def rows(sums, chunk):
      query, a = chunk
      kernel, scaling, f = _row_fit(scores(query, g), a)
      return sums + _to_columns(kernel, scaling), f

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


def cotangents(
  problem: Problem,
  value: Array,
  swept: Swept,
  out_bar: Array,
  precision: jax.lax.PrecisionLike,
) -> Cotangents:
  """Of everything that `iterate` is a function of, from those of its values.

  Args:
    problem: as there.
    value: likewise.
    swept: its result.
    out_bar: `[chunks, batch..., chunk, features]`.
    precision: likewise.
  """
  scores = functools.partial(_scores, problem, precision)
  einsum = functools.partial(jnp.einsum, precision=precision)
  (out, (f, g), iterates), (query, _, a, b) = swept, problem
  last = divide((out_bar * out).sum(-1), a)

  def from_values(sums, chunk):
    query, f, part, out_bar = chunk
    plan = jnp.exp(scores(query, g) + f[..., None])
    value_bar = einsum("...cm,...cv->...mv", plan, out_bar)
    return jax.tree.map(jnp.add, sums, (value_bar, _to_columns(plan, part))), None

  zeros = jnp.zeros_like(value), jnp.zeros_like(g)
  (value_bar, moved), _ = jax.lax.scan(
    from_values, zeros, (query, _absent(f, a), last, out_bar)
  )
  g_bar = (value * value_bar).sum(-1) - moved

  def turn(carry, passed):
    (before, g, previous), active = passed
    column_part = divide(carry if active is None else jnp.where(active, carry, 0.0), b)

    def rows(sums, chunk):
      query, a, f = chunk
      between = jnp.exp(scores(query, g) + _absent(f, a)[..., None])
      part = divide(-_to_rows(between, column_part), a)
      return sums + _to_columns(between, part), part

    sums, row_part = jax.lax.scan(rows, jnp.zeros_like(g), (query, a, before))
    g_bar = -jnp.exp(jnp.where(b > 0, previous - g, 0.0)) * sums
    g_bar = g_bar if active is None else jnp.where(active, g_bar, carry)
    return g_bar, (row_part, column_part)

  def step(carry, passed):
    active = passed[-1]
    if active is None:
      return turn(carry, passed)
    skipped = jnp.zeros_like(a), jnp.zeros_like(b)
    return jax.lax.cond(active.any(), turn, lambda *_: (carry, skipped), carry, passed)

  # The first iteration has none before it: what follows from there is of no use.
  previous = jnp.concatenate([iterates.g[:1], iterates.g[:-1]])
  ways = (iterates.f, iterates.g, previous), iterates.active
  _, (row_parts, column_parts) = jax.lax.scan(step, g_bar, ways, reverse=True)
  start_bar, row_parts = a * row_parts[0], row_parts.at[0].set(0.0)

  # One decision for all of the batch, as in `asap_jax.teacher.gradient`.
  spreads = jnp.where(a > 0, iterates.f - f, 0.0), jnp.where(b > 0, iterates.g - g, 0.0)
  in_range = (
    functools.reduce(jnp.maximum, (jnp.abs(x).max() for x in spreads)) <= LOG_RANGE
  )
  function = functools.partial(_to_tokens, precision)
  parts = last, row_parts, column_parts
  query_bar, key_bar = by_domain(
    function, in_range, problem, value, swept, out_bar, parts
  )
  a_bar, b_bar = last + row_parts.sum(0), column_parts.sum(0)
  return Cotangents(query_bar, key_bar, value_bar, start_bar, a_bar, b_bar)


def _to_tokens(precision, in_range, problem, value, swept, out_bar, parts):
  """Cotangents of queries and keys."""
  einsum = functools.partial(jnp.einsum, precision=precision)
  (_, (f, g), (before, gs, _)), (last, row_parts, column_parts) = swept, parts
  previous = jnp.concatenate([gs[:1], gs[:-1]])

  def rows(key_bar, chunk):
    query, a, f, before, last, row_parts, out_bar = chunk
    logits = _scores(problem, precision, query, jnp.zeros_like(g))
    plan = jnp.exp(logits + _absent(f, a)[..., None] + g[..., None, :])
    own = (out_bar, -last[..., None]), (value, jnp.ones_like(g)[..., None])
    if in_range:
      # One product of rank 2T, and of the plan's own cotangent with it.
      u = jnp.exp(jnp.where(a > 0, before - f, 0.0))
      v, w = (jnp.exp(jnp.where(problem.b > 0, x - g, 0.0)) for x in (gs, previous))
      by_query = *own[0], _last(-row_parts * u), _last(-u)
      by_key = *own[1], _last(w), _last(v * column_parts)
      logits_bar = plan * _rank(by_query, by_key)
    else:

      def add(logits_bar, passed):
        before, g, previous, row_part, column_part = passed
        between = jnp.exp(logits + _absent(before, a)[..., None] + g[..., None, :])
        moved = jnp.exp(jnp.where(problem.b > 0, previous - g, 0.0))
        weights = row_part[..., None] * moved[..., None, :]
        return logits_bar - between * (weights + column_part[..., None, :]), None

      ways = before, gs, previous, row_parts, column_parts
      logits_bar, _ = jax.lax.scan(add, plan * _rank(*own), ways)
    query_bar = einsum("...cm,...md->...cd", logits_bar, problem.key)
    return key_bar + einsum("...cm,...cd->...md", logits_bar, query), query_bar

  before, row_parts = (jnp.moveaxis(x, 0, 1) for x in (before, row_parts))
  chunks = problem.query, problem.a, f, before, last, row_parts, out_bar
  key_bar, query_bar = jax.lax.scan(rows, jnp.zeros_like(problem.key), chunks)
  return query_bar, key_bar


def _scores(problem: Problem, precision: Any, query: Array, g: Array) -> Array:
  products = jnp.einsum("...cd,...md->...cm", query, problem.key, precision=precision)
  return products + _absent(g, problem.b)[..., None, :]


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
    products = jnp.einsum("...cd,...md->...cm", query, problem.key, precision=precision)
    scores = products + _absent(f, a)[..., None]
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


def _absent(dual: Array, marginal: Array) -> Array:
  return jnp.where(marginal > 0, dual, LOG_ZERO)


def _log(sums: Array) -> Array:
  return jnp.log(jnp.where(sums > 0, sums, 1.0))


def _rank(by_query: Sequence[Array], by_key: Sequence[Array]) -> Array:
  joined = (jnp.concatenate(each, -1) for each in (by_query, by_key))
  return exact_einsum("...cr,...mr->...cm", *joined)


def _last(array: Array) -> Array:
  return jnp.moveaxis(array, 0, -1)


def _to_rows(kernel: Array, vector: Array) -> Array:
  return exact_einsum("...cm,...m->...c", kernel, vector)


def _to_columns(kernel: Array, vector: Array) -> Array:
  return exact_einsum("...cm,...c->...m", kernel, vector)
