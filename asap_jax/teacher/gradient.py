"""The gradient of a fixed number of Sinkhorn iterations, in memory that T leaves alone.

Unrolled differentiation keeps, or recomputes, an n x m matrix for each half-iteration.
All of them are one matrix scaled on both sides: with the final plan P = exp(S + f + g)
and u_t = exp(f_t - f), v_t = exp(g_t - g), the plan of any iterate is u_t P v_t. So the
iterates are recovered by matrix-vector products with P, cotangents go back through more
of them, and the cotangent of S is P times a matrix of rank 2T. Where an iterate is so
far from the end that u or v leaves float32's range (sharp logits), the same recursion
runs in the log domain instead, at one exponential of the matrix per half-iteration.

Derived here by reverse mode from g_t = log b - LSE_i(S + f_(t-1)) and
f_t = log a - LSE_j(S + g_t); Peyré and Cuturi, 2019, "Computational Optimal Transport",
section 9.1.3, has the principle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# |log u|, |log v| up to which the scaling domain is used. Entries of P that underflow
# (below e^-87) could then have had a weight of e^(60 - 87) at most in any iterate.
_LOG_RANGE = 30.0


class Cotangents(NamedTuple):
  """Of logits `[..., n, m]`, masses `[..., n]` and `[..., m]`, and start `[..., n]`."""

  logits: jax.Array
  a: jax.Array
  b: jax.Array
  start: jax.Array


def unrolled_cotangents(
  logits: jax.Array,
  a: jax.Array,
  b: jax.Array,
  start: jax.Array,
  f: jax.Array,
  g: jax.Array,
  f_bar: jax.Array,
  g_bar: jax.Array,
  iterations: int,
) -> Cotangents:
  """Cotangents of the inputs of `iterations` Sinkhorn iterations, given the outputs'.

  Args:
    logits: S, finite, `[..., n, m]`.
    a: masses of the rows, `[..., n]`, zero where absent.
    b: masses of the columns, `[..., m]`.
    start: the f that the first iteration took, `[..., n]`.
    f: the last f, in the convention where exp(S + f + g) has row sums a; anything
      where a is zero.
    g: the last g, `[..., m]`.
    f_bar: cotangent of f.
    g_bar: cotangent of g.
    iterations: full iterations, T.

  Returns:
    `Cotangents`, zero wherever a mass is zero.
  """
  rows, columns = a > 0, b > 0
  f, start = jnp.where(rows, f, 0.0), jnp.where(rows, start, 0.0)
  g = jnp.where(columns, g, 0.0)
  f_bar, g_bar = jnp.where(rows, f_bar, 0.0), jnp.where(columns, g_bar, 0.0)
  pairs = rows[..., :, None] & columns[..., None, :]
  # The plan of any duals is scaled from here, or exponentiated anew.
  logits = jnp.where(pairs, logits, -1e30)
  plan = jnp.exp(logits + f[..., :, None] + g[..., None, :])

  def divide(numerator, denominator, where):
    return jnp.where(where, numerator / jnp.where(where, denominator, 1.0), 0.0)

  def log_ratio(scaling, where):
    return jnp.where(where, jnp.log(jnp.where(where, scaling, 1.0)), 0.0)

  def iterate(u, _):
    v = divide(b, _transpose_times(plan, u), columns)
    new = divide(a, _times(plan, v), rows)
    return new, (u, v, new)

  first = jnp.where(rows, jnp.exp(start - f), 0.0)
  _, (u_before, v, u_after) = jax.lax.scan(iterate, first, length=iterations)
  spread = [
    jnp.max(jnp.abs(log_ratio(scaling, where)), initial=0.0)
    for scaling, where in ((u_before, rows), (u_after, rows), (v, columns))
  ]
  # Zero or infinite scalings give an infinite spread, NaN compares false.
  tame = (spread[0] <= _LOG_RANGE) & (spread[1] <= _LOG_RANGE)
  tame &= spread[2] <= _LOG_RANGE

  def by_scaling():
    def step(carry, scalings):
      f_bar, g_bar = carry
      before, v, after = scalings
      row_part = divide(f_bar * after, a, rows)
      g_bar = g_bar - v * _transpose_times(plan, row_part)
      column_part = divide(g_bar * v, b, columns)
      start_bar = -before * _times(plan, column_part)
      parts = (row_part, v, before, column_part, f_bar, g_bar)
      return (start_bar, jnp.zeros_like(g_bar)), parts

    (start_bar, _), parts = jax.lax.scan(
      step, (f_bar, g_bar), (u_before, v, u_after), reverse=True
    )
    row_part, v_all, before, column_part, f_bars, g_bars = parts
    rank = jnp.einsum("t...n,t...m->...nm", row_part, v_all)
    rank = rank + jnp.einsum("t...n,t...m->...nm", before, column_part)
    return -plan * rank, f_bars.sum(0), g_bars.sum(0), start_bar

  def by_logarithm():
    def forward(f, _):
      g = jnp.log(jnp.where(columns, b, 1.0)) - _lse(logits + f[..., :, None], -2)
      g = jnp.where(columns, g, 0.0)
      new = jnp.log(jnp.where(rows, a, 1.0)) - _lse(logits + g[..., None, :], -1)
      return jnp.where(rows, new, 0.0), (f, g, jnp.where(rows, new, 0.0))

    def backward(carry, duals):
      f_bar, g_bar, logits_bar = carry
      before, g, after = duals
      row_plan = jnp.exp(logits + after[..., :, None] + g[..., None, :])
      row_part = divide(f_bar, a, rows)
      g_bar = g_bar - _transpose_times(row_plan, row_part)
      column_plan = jnp.exp(logits + before[..., :, None] + g[..., None, :])
      column_part = divide(g_bar, b, columns)
      logits_bar = logits_bar - row_plan * row_part[..., :, None]
      logits_bar = logits_bar - column_plan * column_part[..., None, :]
      start_bar = -_times(column_plan, column_part)
      return (start_bar, jnp.zeros_like(g_bar), logits_bar), (f_bar, g_bar)

    _, duals = jax.lax.scan(forward, start, length=iterations)
    (start_bar, _, logits_bar), (f_bars, g_bars) = jax.lax.scan(
      backward, (f_bar, g_bar, jnp.zeros_like(plan)), duals, reverse=True
    )
    return logits_bar, f_bars.sum(0), g_bars.sum(0), start_bar

  logits_bar, f_sum, g_sum, start_bar = jax.lax.cond(tame, by_scaling, by_logarithm)
  return Cotangents(
    jnp.where(pairs, logits_bar, 0.0),
    divide(f_sum, a, rows),
    divide(g_sum, b, columns),
    jnp.where(rows, start_bar, 0.0),
  )


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  return jnp.einsum("...nm,...m->...n", matrix, vector, precision="highest")


def _transpose_times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  return jnp.einsum("...nm,...n->...m", matrix, vector, precision="highest")


def _lse(scores: jax.Array, axis: int) -> jax.Array:
  return jax.nn.logsumexp(scores, axis=axis)
