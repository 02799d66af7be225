r"""The gradient of iterations by sweeps, by one sweep an iteration as well.

With the plan between the halves of iteration t, $Q_t = \exp(S + f_{t-1} + g_t)$, and
bars for cotangents,

$$\bar f_{t-1} = -Q_t\,(\bar g_t / b), \qquad
\bar g_{t-1} = -e^{g_{t-1} - g_t}\, Q_t^T (\bar f_{t-1} / a):$$

a chunk of queries takes the first, and adds at once what it gives to the second. The
factor in front is at most the sum of a plan over the least b, whatever the logits: it
cannot leave the range of float32 as the factors between distant iterates can.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.implementations.sweeps import (
  Problem,
  Swept,
  absent_low,
  scores_of,
  to_columns,
)
from asap_jax.numerics import exact_einsum, logits_einsum
from asap_jax.teacher.gradient import by_domain, divide, in_range


class Cotangents(NamedTuple):
  """Of the arguments of `iterate`, in their layout."""

  query: Array
  key: Array
  value: Array
  start: Array
  a: Array
  b: Array


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
  scores = functools.partial(scores_of, problem, precision)
  einsum = functools.partial(jnp.einsum, precision=precision)
  (out, (f, g), iterates), (query, _, a, b, _) = swept, problem
  last = divide((out_bar * out).sum(-1), a)

  def from_values(sums, chunk):
    query, f, part, out_bar = chunk
    plan = jnp.exp(scores(query, g) + f[..., None])
    value_bar = einsum("...cm,...cv->...mv", plan, out_bar)
    return jax.tree.map(jnp.add, sums, (value_bar, to_columns(plan, part))), None

  zeros = jnp.zeros_like(value), jnp.zeros_like(g)
  (value_bar, moved), _ = jax.lax.scan(
    from_values, zeros, (query, absent_low(f, a), last, out_bar)
  )
  g_bar = (value * value_bar).sum(-1) - moved

  def turn(carry, passed):
    (before, g, previous), active = passed
    column_part = divide(carry if active is None else jnp.where(active, carry, 0.0), b)

    def rows(sums, chunk):
      query, a, f = chunk
      between = jnp.exp(scores(query, g) + absent_low(f, a)[..., None])
      part = divide(-_to_rows(between, column_part), a)
      return sums + to_columns(between, part), part

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
  start_bar = a * row_parts[0]
  row_parts = jnp.concatenate([jnp.zeros_like(row_parts[:1]), row_parts[1:]])

  function = functools.partial(_to_tokens, precision)
  parts = last, row_parts, column_parts
  near = in_range(a, b, swept.duals, iterates)
  query_bar, key_bar = by_domain(function, near, problem, value, swept, out_bar, parts)
  a_bar, b_bar = last + row_parts.sum(0), column_parts.sum(0)
  return Cotangents(query_bar, key_bar, value_bar, start_bar, a_bar, b_bar)


def _to_tokens(precision, near, problem, value, swept, out_bar, parts):
  """Cotangents of queries and keys."""
  einsum = functools.partial(logits_einsum, precision=precision)
  (_, (f, g), (before, gs, _)), (last, row_parts, column_parts) = swept, parts
  previous = jnp.concatenate([gs[:1], gs[:-1]])

  def rows(key_bar, chunk):
    query, a, f, before, last, row_parts, out_bar = chunk
    logits = scores_of(problem, precision, query, jnp.zeros_like(g))
    plan = jnp.exp(logits + absent_low(f, a)[..., None] + g[..., None, :])
    own = (out_bar, -last[..., None]), (value, jnp.ones_like(g)[..., None])
    if near:
      # One product of rank 2T, and of the plan's own cotangent with it.
      u = jnp.exp(jnp.where(a > 0, before - f, 0.0))
      v, w = (jnp.exp(jnp.where(problem.b > 0, x - g, 0.0)) for x in (gs, previous))
      by_query = *own[0], _last(-row_parts * u), _last(-u)
      by_key = *own[1], _last(w), _last(v * column_parts)
      logits_bar = plan * _rank(by_query, by_key)
    else:

      def add(logits_bar, passed):
        before, g, previous, row_part, column_part = passed
        between = jnp.exp(logits + absent_low(before, a)[..., None] + g[..., None, :])
        moved = jnp.exp(jnp.where(problem.b > 0, previous - g, 0.0))
        weights = row_part[..., None] * moved[..., None, :]
        return logits_bar - between * (weights + column_part[..., None, :]), None

      ways = before, gs, previous, row_parts, column_parts
      logits_bar, _ = jax.lax.scan(add, plan * _rank(*own), ways)
    query_bar = einsum("...cm,...md->...cd", logits_bar, problem.key)
    return key_bar + einsum("...cm,...cd->...md", logits_bar, query.tokens), query_bar

  before, row_parts = (jnp.moveaxis(x, 0, 1) for x in (before, row_parts))
  chunks = problem.query, problem.a, f, before, last, row_parts, out_bar
  key_bar, query_bar = jax.lax.scan(rows, jnp.zeros_like(problem.key), chunks)
  return query_bar, key_bar


def _rank(by_query: Sequence[Array], by_key: Sequence[Array]) -> Array:
  joined = (jnp.concatenate(each, -1) for each in (by_query, by_key))
  return exact_einsum("...cr,...mr->...cm", *joined)


def _last(array: Array) -> Array:
  return jnp.moveaxis(array, 0, -1)


def _to_rows(kernel: Array, vector: Array) -> Array:
  return exact_einsum("...cm,...m->...c", kernel, vector)
