r"""Gradient of a fixed number of Sinkhorn iterations, in memory that T leaves alone.

Unrolled differentiation keeps, or recomputes, an n x m matrix for each half-iteration.
All of them are one matrix scaled on both sides: with the final plan
$P = \exp(S + f + g)$ and $u_t = \exp(f_t - f)$, $v_t = \exp(g_t - g)$, the plan of any
iterate is $u_t P v_t$. So cotangents go back through the iterations by two
matrix-vector products with P each, and the cotangent of S is P times a matrix of rank
2T; of the forward pass nothing is kept but the duals.

There are two domains, since u and v leave float32's range where an iterate is far from
the end (sharp logits). The same recursion then runs in the log domain, which holds for
any logits but takes one exponential of the matrix per half-iteration.

Derived here by reverse mode from $g_t = \log b - LSE_i(S + f_{t-1})$ and
$f_t = \log a - LSE_j(S + g_t)$; Peyré and Cuturi, 2019, "Computational Optimal
Transport", section 9.1.3, has the principle.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import LOG_ZERO, Duals
from asap_jax.c_transform.iterates import Iterates
from asap_jax.numerics import exact_einsum

T = TypeVar("T")

# |log u|, |log v| up to which the scaling domain is used. Entries of P that underflow
# (below e^-87) could then have had a weight of e^(60 - 87) at most in any iterate.
_LOG_RANGE = 30.0


class Cotangents(NamedTuple):
  """Of what `iterations` are a function of; zero at absent points.

  Attributes:
    logits: `[..., n, m]`.
    a: masses of the rows, `[..., n]`.
    b: masses of the columns, `[..., m]`.
    start: the dual that the first iteration took, `[..., n]`.
  """

  logits: Float[Array, "*batch n m"]
  a: Float[Array, "*batch n"]
  b: Float[Array, "*batch m"]
  start: Float[Array, "*batch n"]


class Iterations(NamedTuple):
  """What the backward pass knows of full Sinkhorn iterations.

  Attributes:
    logits: S, `[..., n, m]`, finite.
    a: sums of the plan's rows, `[..., n]`, zero where absent.
    b: of its columns, `[..., m]`, likewise.
    duals: the last ones; exp(S + f + g) has row sums a. They may hold anything at
      absent points, as the next.
    iterates: of all iterations, in the same convention.
  """

  logits: Float[Array, "*batch n m"]
  a: Float[Array, "*batch n"]
  b: Float[Array, "*batch m"]
  duals: Duals
  iterates: Iterates

  def plan(self) -> Array:
    """That of the last duals."""
    _, f, _, _, g = self._sides()
    return self._plan_of(f, g)

  def _plan_of(self, f: Array, g: Array) -> Array:
    return jnp.exp(self.logits + f[..., :, None] + g[..., None, :])

  def _sides(self) -> tuple[Array, Array, Array, Array, Array]:
    return _sides(*self[1:])

  def cotangents(
    self, in_range: bool, bars: Duals, factors: Sequence[Array] = ()
  ) -> Cotangents:
    """Cotangents of the iterations, from those of their last duals.

    Args:
      in_range: whether to take the scaling domain, or the log domain.
      bars: cotangents of the last duals.
      factors: two matrices `[..., n, k]` and `[..., m, k]`, whose product is the plan's
        own cotangent, to add what reaches the logits through the plan, the duals apart.
    """
    rows, columns = self.a > 0, self.b > 0
    bars = Duals(jnp.where(rows, bars.f, 0.0), jnp.where(columns, bars.g, 0.0))
    backward = self._by_scaling if in_range else self._by_logarithm
    logits_bar, f_bars, g_bars, start_bar = backward(bars, factors)
    return Cotangents(
      logits_bar,
      divide(f_bars.sum(0), self.a),
      divide(g_bars.sum(0), self.b),
      jnp.where(rows, start_bar, 0.0),
    )

  def _by_scaling(self, bars, factors):
    before, f, after, gs, g = self._sides()
    plan = self._plan_of(f, g)
    scalings = jnp.exp(before - f), jnp.exp(gs - g), jnp.exp(after - f)

    @_where_active
    def step(carry, scalings):
      f_bar, g_bar = carry
      before, v, after = scalings
      row_part = divide(f_bar * after, self.a)
      g_bar = g_bar - v * _to_columns(plan, row_part)
      column_part = divide(g_bar * v, self.b)
      start_bar = -before * _to_rows(plan, column_part)
      return (start_bar, jnp.zeros_like(g_bar)), (row_part, column_part, f_bar, g_bar)

    (start_bar, _), (row_parts, column_parts, f_bars, g_bars) = jax.lax.scan(
      step, tuple(bars), (scalings, self.iterates.active), reverse=True
    )
    # One product of rank 2T, and of the plan's own cotangent with it.
    u, v, _ = scalings
    by_row, by_column = (
      jnp.concatenate([*own, *(jnp.moveaxis(x, 0, -1) for x in parts)], -1)
      for own, parts in (
        (factors[:1], (-row_parts, -u)),
        (factors[1:], (v, column_parts)),
      )
    )
    logits_bar = plan * exact_einsum("...nt,...mt->...nm", by_row, by_column)
    return logits_bar, f_bars, g_bars, start_bar

  def _by_logarithm(self, bars, factors):
    before, f, after, gs, g = self._sides()

    @_where_active
    def step(carry, duals):
      f_bar, g_bar, logits_bar = carry
      before, g, after = duals
      row_plan, row_part = self._plan_of(after, g), divide(f_bar, self.a)
      g_bar = g_bar - _to_columns(row_plan, row_part)
      column_plan, column_part = (
        self._plan_of(before, g),
        divide(g_bar, self.b),
      )
      logits_bar = logits_bar - row_plan * row_part[..., :, None]
      logits_bar = logits_bar - column_plan * column_part[..., None, :]
      start_bar = -_to_rows(column_plan, column_part)
      return (start_bar, jnp.zeros_like(g_bar), logits_bar), (f_bar, g_bar)

    direct = jnp.zeros_like(self.logits)
    if factors:
      direct = self._plan_of(f, g) * exact_einsum("...nt,...mt->...nm", *factors)
    (start_bar, _, logits_bar), (f_bars, g_bars) = jax.lax.scan(
      step, (*bars, direct), ((before, gs, after), self.iterates.active), reverse=True
    )
    return logits_bar, f_bars, g_bars, start_bar


def _where_active(step: Callable[..., Any]) -> Callable[..., Any]:
  """A step of a scan that leaves cotangents as they are where it was not run forward.

  A step is linear in its carry, whose first two are cotangents of f and g.
  """

  def taken(carry, passed, active):
    f_bar, g_bar, *sums = carry
    held = [jnp.where(active, 0.0, bar) for bar in (f_bar, g_bar)]
    (f_bar, g_bar, *sums), parts = step(
      (f_bar - held[0], g_bar - held[1], *sums), passed
    )
    return (f_bar + held[0], g_bar + held[1], *sums), parts

  def in_scan(carry, passed):
    passed, active = passed
    if active is None:
      return step(carry, passed)

    def skipped(*_):
      parts = jax.eval_shape(taken, carry, passed, active)[1]
      return carry, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), parts)

    return jax.lax.cond(active.any(), taken, skipped, carry, passed, active)

  return in_scan


def _sides(
  a: Array, b: Array, duals: Duals, iterates: Iterates
) -> tuple[Array, Array, Array, Array, Array]:
  """f before each iteration, at last, and after each; g of each, and at last."""
  rows, columns = a > 0, b > 0
  before = jnp.where(rows, iterates.f, LOG_ZERO)
  f = jnp.where(rows, duals.f, LOG_ZERO)
  after = jnp.concatenate([before[1:], f[None]])
  gs = jnp.where(columns, iterates.g, LOG_ZERO)
  return before, f, after, gs, jnp.where(columns, duals.g, LOG_ZERO)


def in_range(a: Array, b: Array, duals: Duals, iterates: Iterates) -> Array:
  """Whether the scaling domain serves: one decision for all of the batch."""
  before, f, _, gs, g = _sides(a, b, duals, iterates)
  spread = [jnp.max(jnp.abs(x), initial=0.0) for x in (before - f, gs - g)]
  return jnp.maximum(*spread) <= _LOG_RANGE


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def by_domain(function: Callable[..., T], in_range: Array, *arguments: Any) -> T:
  """`function(in_range, *arguments)`, which is static there, as the array tells.

  Args:
    function: hashable, of arrays that are all among the arguments.
    in_range: one boolean.
    *arguments: pytrees of arrays.
  """
  # The log domain as a loop of no or one turn: XLA keeps the rest as it is, while a
  # branch would cost a tenth of it, and under vmap both would always be taken.
  found, _ = jax.lax.while_loop(
    lambda carry: ~carry[1],
    lambda carry: (function(False, *arguments), jnp.ones((), bool)),
    (function(True, *arguments), in_range),
  )
  return found


@by_domain.defjvp
def _by_domain_jvp(function, primals, tangents):
  (in_range, *arguments), (_, *moved) = primals, tangents

  def branch(*arguments):
    branches = (functools.partial(function, domain) for domain in (True, False))
    return jax.lax.cond(in_range, *branches, *arguments)

  return jax.jvp(branch, arguments, moved)


def divide(numerator: Array, denominator: Array) -> Array:
  """Quotient, zero where there is no mass."""
  there = denominator > 0
  return jnp.where(there, numerator / jnp.where(there, denominator, 1.0), 0.0)


def cotangents(in_range: bool, passed: Iterations, bars: Duals) -> Cotangents:
  """`Iterations.cotangents`, for `by_domain`."""
  return passed.cotangents(in_range, bars)


def _to_rows(matrix: Array, vector: Array) -> Array:
  return exact_einsum("...nm,...m->...n", matrix, vector)


def _to_columns(matrix: Array, vector: Array) -> Array:
  return exact_einsum("...nm,...n->...m", matrix, vector)
