r"""Gradient of a fixed number of Sinkhorn iterations, in memory that T leaves alone.

Unrolled differentiation keeps, or recomputes, an n x m matrix for each half-iteration.
All of them are one matrix scaled on both sides: with the final plan
$P = \exp(S + f + g)$ and $u_t = \exp(f_t - f)$, $v_t = \exp(g_t - g)$, the plan of any
iterate is $u_t P v_t$. So the iterates are recovered by matrix-vector products with P,
cotangents go back through more of them, and the cotangent of S is P times a matrix of
rank 2T.

There are two domains, since u and v leave float32's range where an iterate is far from
the end (sharp logits). The same recursion then runs in the log domain, which holds for
any logits but takes one exponential of the matrix per half-iteration.

Derived here by reverse mode from $g_t = \log b - LSE_i(S + f_{t-1})$ and
$f_t = \log a - LSE_j(S + g_t)$; Peyré and Cuturi, 2019, "Computational Optimal
Transport", section 9.1.3, has the principle.
"""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Float

from asap_jax.numerics import exact_einsum

# |log u|, |log v| up to which the scaling domain is used. Entries of P that underflow
# (below e^-87) could then have had a weight of e^(60 - 87) at most in any iterate.
_LOG_RANGE = 30.0


def unrolled_cotangents(
  logits: Float[Array, "*batch n m"],
  a: Float[Array, "*batch n"],
  b: Float[Array, "*batch m"],
  start: Float[Array, "*batch n"],
  f: Float[Array, "*batch n"],
  g: Float[Array, "*batch m"],
  f_bar: Float[Array, "*batch n"],
  g_bar: Float[Array, "*batch m"],
  iterations: int,
) -> tuple[Array, Array, Array, Array]:
  """Cotangents of logits, a, b and start of `iterations` full Sinkhorn iterations.

  Logits are finite; a and b are masses, zero where absent, and the cotangents are zero
  there, too. f and g are the last duals, in the convention where exp(S + f + g) has row
  sums a; they may hold anything at absent points. The first iteration took `start`.
  """
  rows, columns = a > 0, b > 0
  f, start, f_bar = (jnp.where(rows, x, 0.0) for x in (f, start, f_bar))
  g, g_bar = (jnp.where(columns, x, 0.0) for x in (g, g_bar))
  pairs = rows[..., :, None] & columns[..., None, :]
  logits = jnp.where(pairs, logits, -1e30)

  def plan_of(f, g):
    return jnp.exp(logits + f[..., :, None] + g[..., None, :])

  plan = plan_of(f, g)

  def iterate(u, _):
    v = _divide(b, _to_columns(plan, u), columns)
    new = _divide(a, _to_rows(plan, v), rows)
    return new, (u, v, new)

  first = jnp.where(rows, jnp.exp(start - f), 0.0)
  _, scalings = jax.lax.scan(iterate, first, length=iterations)
  # Zero or infinite scalings give an infinite spread, NaN compares false.
  spread = [
    jnp.max(jnp.abs(jnp.log(jnp.where(there, scaling, 1.0))), initial=0.0)
    for scaling, there in zip(scalings, (rows, columns, rows), strict=True)
  ]

  def by_scaling():
    def backward(carry, scalings):
      f_bar, g_bar = carry
      before, v, after = scalings
      row_part = _divide(f_bar * after, a, rows)
      g_bar = g_bar - v * _to_columns(plan, row_part)
      column_part = _divide(g_bar * v, b, columns)
      start_bar = -before * _to_rows(plan, column_part)
      parts = (row_part, v), (before, column_part)
      return (start_bar, jnp.zeros_like(g_bar)), (parts, f_bar, g_bar)

    (start_bar, _), (parts, f_bars, g_bars) = jax.lax.scan(
      backward, (f_bar, g_bar), scalings, reverse=True
    )
    outer = [exact_einsum("t...n,t...m->...nm", *part) for part in parts]
    return -plan * (outer[0] + outer[1]), f_bars.sum(0), g_bars.sum(0), start_bar

  def by_logarithm():
    log_a, log_b = (jnp.log(jnp.where(x > 0, x, 1.0)) for x in (a, b))

    def forward(f, _):
      g = jnp.where(columns, log_b - logsumexp(logits + f[..., :, None], axis=-2), 0.0)
      new = jnp.where(rows, log_a - logsumexp(logits + g[..., None, :], axis=-1), 0.0)
      return new, (f, g, new)

    def backward(carry, duals):
      f_bar, g_bar, logits_bar = carry
      before, g, after = duals
      row_plan, row_part = plan_of(after, g), _divide(f_bar, a, rows)
      g_bar = g_bar - _to_columns(row_plan, row_part)
      column_plan, column_part = plan_of(before, g), _divide(g_bar, b, columns)
      logits_bar = logits_bar - row_plan * row_part[..., :, None]
      logits_bar = logits_bar - column_plan * column_part[..., None, :]
      start_bar = -_to_rows(column_plan, column_part)
      return (start_bar, jnp.zeros_like(g_bar), logits_bar), (f_bar, g_bar)

    _, duals = jax.lax.scan(forward, start, length=iterations)
    (start_bar, _, logits_bar), (f_bars, g_bars) = jax.lax.scan(
      backward, (f_bar, g_bar, jnp.zeros_like(plan)), duals, reverse=True
    )
    return logits_bar, f_bars.sum(0), g_bars.sum(0), start_bar

  logits_bar, f_sum, g_sum, start_bar = jax.lax.cond(
    jnp.stack(spread).max() <= _LOG_RANGE, by_scaling, by_logarithm
  )
  return (
    jnp.where(pairs, logits_bar, 0.0),
    _divide(f_sum, a, rows),
    _divide(g_sum, b, columns),
    jnp.where(rows, start_bar, 0.0),
  )


def _divide(numerator: Array, denominator: Array, there: Array) -> Array:
  """Quotient, zero where there is no mass."""
  return jnp.where(there, numerator / jnp.where(there, denominator, 1.0), 0.0)


def _to_rows(matrix: Array, vector: Array) -> Array:
  return exact_einsum("...nm,...m->...n", matrix, vector)


def _to_columns(matrix: Array, vector: Array) -> Array:
  return exact_einsum("...nm,...n->...m", matrix, vector)
