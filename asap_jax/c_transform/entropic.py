r"""Entropic c-transforms, the two-sided closure, and the plan.

Attention weights are $A_{ij} = \exp(S_{ij} + f_i + g_j)$ with logits S and duals f, g
in the units of the logits. Valid rows of A sum to one and its columns to
n_valid / m_valid; in terms of the usual transport plan P, which sums to one,
A = n_valid P. With float weights a and b, rows sum to n_valid a_i and columns to
n_valid b_j.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.masses import (
  Masses,
  Side,
  check_dual,
  check_weights,
  normalised,
  valid,
  valid_pairs,
  zero_invalid,
)
from asap_jax.numerics import float_dtype
from asap_jax.sizes import Size, as_number

# Log 0 everywhere in this package: finite, so that gradients of masked entries are zero
# and not NaN.
LOG_ZERO = -1e30


class Duals(NamedTuple):
  """Dual variables of entropic transport, in units of logits; zero on absent points.

  Attributes:
    f: query side, `[..., n]`; (f + c, g - c) is the same plan for any constant c.
    g: key side, `[..., m]`.

  Example:
    >>> duals = closure(jnp.zeros((3, 2)), jnp.zeros(3))
    >>> duals.f.shape, duals.g.shape
    ((3,), (2,))
  """

  f: Float[Array, "... n"]
  g: Float[Array, "... m"]


def c_transform(
  logits: Float[Array, "*batch n m"],
  dual: Float[Array, "..."],
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  to: Side,
) -> Float[Array, "..."]:
  r"""The entropic c-transform of one side's dual: the dual of the other side.

  $$g_j = \log c_j - \log \sum_i \exp(S_{ij} + f_i), \qquad
  f_i = \log r_i - \log \sum_j \exp(S_{ij} + g_j),$$

  with r and c the row and column sums of the plan (module docstring). Half a Sinkhorn
  iteration (Peyré and Cuturi, 2019, "Computational Optimal Transport", equation 4.43).

  Works under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    dual: f `[..., n]` if `to` is `"key"`, g `[..., m]` if it is `"query"`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    to: the side whose dual is computed.

  Returns:
    The dual `[..., m]` or `[..., n]`, at least float32, zero on absent points.

  Raises:
    ValueError: if weights do not fit the logits or `to` is unknown.
  """
  check_logits(logits, query_weights, key_weights)
  n, m = logits.shape[-2:]
  logits = logits.astype(float_dtype(logits))
  if to == "key":
    summed, target = -2, key_weights
    marginal = column_sums(query_weights, key_weights, n, m)
    scores = logits + dual[..., :, None]
  elif to == "query":
    summed, target = -1, query_weights
    marginal = row_sums(query_weights, n)
    scores = logits + dual[..., None, :]
  else:
    raise ValueError(f"to={to!r}: expected 'query' or 'key'")
  pairs = valid_pairs(query_weights, key_weights)
  if pairs is not None:
    scores = jnp.where(pairs, scores, LOG_ZERO)
  log_marginal = jnp.log(jnp.where(marginal > 0, marginal, 1.0))
  return zero_invalid(log_marginal - jax.nn.logsumexp(scores, axis=summed), target)


def closure(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Duals:
  """The two-sided closure: g from f, then f anew from g.

  It is one Sinkhorn iteration started at f; rows of the plan are exact after it. Works
  under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    f: query-side dual to start at, `[..., n]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.

  Returns:
    `Duals` of the closed plan.

  Raises:
    ValueError: as in `c_transform`, and if `f` does not fit the logits.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [1.0, 1.0]])
    >>> plan(logits, closure(logits, jnp.zeros(2))).sum(-1).round(4).tolist()
    [1.0, 1.0]
  """
  check_dual("f", f, logits.shape[-2])
  g = c_transform(logits, f, query_weights, key_weights, to="key")
  return Duals(c_transform(logits, g, query_weights, key_weights, to="query"), g)


def closures(
  logits: Float[Array, "*batch n m"],
  dual: Float[Array, "..."],
  count: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
) -> Duals:
  r"""`count` closures in a row: as many Sinkhorn iterations started at a dual.

  A closure takes $f_t$ to $F(f_t)$, and the next one starts at
  $f_{t+1} = f_t + \omega_t (F(f_t) - f_t) + c_t (f_t - f_{t-1})$, with over-relaxation
  $\omega$ (Thibault et al., 2021, arXiv 1711.01851) and momentum c. The last closure is
  plain, so rows of the plan are exact.

  A key-side dual g takes half an iteration to its f first. That alone, `count=0`, is
  half a closure: softmax of S + g, with exact rows.

  Works under jit, vmap and grad, in `relaxation` and `momentum` too.

  Args:
    logits: S, `[..., n, m]`.
    dual: what to start at: f, `[..., n]`, or g, `[..., m]`.
    count: closures, at least one; from the key side none will do.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    relaxation: omega, `[..., count - 1]`, broadcast against the batch axes of the
      logits; all ones by default.
    momentum: c, like `relaxation`; all zeros by default. Its first column counts for
      nothing: there is no $f_{-1}$.
    side: whose dual it is, `"query"` or `"key"`.

  Returns:
    `Duals` of the plan that is closed last.

  Raises:
    ValueError: if `count` is too small or `relaxation` or `momentum` does not have
      `count - 1` columns; else as in `c_transform`.

  Example:
    >>> logits = jnp.array([[2.0, 0.0], [1.0, 1.0]])
    >>> plan(logits, closures(logits, jnp.zeros(2), 20)).sum(-2).round(4).tolist()
    [1.0, 1.0]
  """
  check_closures(count, relaxation, momentum, side)
  weights = query_weights, key_weights
  check_logits(logits, *weights)
  check_dual("dual", dual, logits.shape[-1 if side == "key" else -2])
  if side == "key":
    g = dual
    dual = c_transform(logits, g, *weights, to="query")
    if count == 0:
      return Duals(dual, zero_invalid(g.astype(dual.dtype), key_weights))

  def step(carry, factors):
    f, before = carry
    return (advance(before, f, closure(logits, f, *weights).f, *factors), f), None

  f = dual
  if count > 1:
    dtype = float_dtype(logits, f)
    f = zero_invalid(f.astype(dtype), query_weights)
    f = jnp.broadcast_to(f, logits.shape[:-1])
    factors = by_closure(relaxation, momentum, dtype)
    (f, _), _ = jax.lax.scan(step, (f, f), factors, length=count - 1)
  return closure(logits, f, *weights)


def advance(
  before: Array, f: Array, closed: Array, omega: Array | None, c: Array | None
) -> Array:
  """f + omega (closed - f) + c (f - before), the start of the next closure.

  Args:
    before: the start of the closure before this one, `[..., n]`.
    f: the start of this closure.
    closed: what this closure made of it.
    omega: `[...]`, or `None` for one.
    c: `[...]`, or `None` for zero.
  """
  moved = closed if omega is None else f + omega[..., None] * (closed - f)
  return moved if c is None else moved + c[..., None] * (f - before)


def by_closure(
  relaxation: Array | None, momentum: Array | None, dtype: jnp.dtype
) -> tuple[Array | None, Array | None]:
  """Factors `[..., count - 1]` with the closures in front, for a scan over them."""
  return jax.tree.map(
    lambda x: jnp.moveaxis(x.astype(dtype), -1, 0), (relaxation, momentum)
  )


def check_closures(
  count: int,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
) -> None:
  """Raises ValueError unless `closures` can do with these arguments."""
  if side not in get_args(Side):
    raise ValueError(f"side={side!r}: expected one of {get_args(Side)}")
  least = 0 if side == "key" else 1
  if count < least:
    raise ValueError(
      f"count={count}: expected at least {least} from the {side} side's dual"
    )
  for name, factors in (("relaxation", relaxation), ("momentum", momentum)):
    if factors is not None and factors.shape[-1:] != (max(count - 1, 0),):
      raise ValueError(
        f"{name} has shape {factors.shape}: expected [..., {max(count - 1, 0)}], one "
        f"factor between every two of count={count} closures"
      )


def plan(
  logits: Float[Array, "*batch n m"],
  duals: Duals,
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch n m"]:
  """Attention weights exp(S + f + g), exactly zero where a point is absent.

  Works under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    duals: f `[..., n]` and g `[..., m]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.

  Returns:
    `[..., n, m]`, float32 or better.

  Raises:
    ValueError: if weights or duals do not fit the logits.

  Example:
    >>> duals = closure(jnp.zeros((2, 4)), jnp.zeros(2))
    >>> plan(jnp.zeros((2, 4)), duals).tolist()
    [[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]]
  """
  check_logits(logits, query_weights, key_weights)
  for name, dual, size in zip(("f", "g"), duals, logits.shape[-2:], strict=True):
    check_dual(f"duals.{name}", dual, size)
  logits = logits.astype(float_dtype(logits))
  scores = logits + duals.f[..., :, None] + duals.g[..., None, :]
  pairs = valid_pairs(query_weights, key_weights)
  return jnp.exp(scores if pairs is None else jnp.where(pairs, scores, LOG_ZERO))


def apply_plan(
  logits: Float[Array, "*batch n m"],
  duals: Duals,
  value: Float[Array, "*#batch m features"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch n features"]:
  """The plan applied to values.

  Works under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    duals: f `[..., n]` and g `[..., m]`.
    value: `[..., m, features]`; those of absent keys may hold anything.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.

  Returns:
    `[..., n, features]` in the dtype of the values.

  Raises:
    ValueError: as in `plan`.
  """
  weights = plan(logits, duals, query_weights, key_weights)
  value = zero_invalid(value, key_weights, axis=-2)
  return jnp.einsum("...nm,...mv->...nv", weights.astype(value.dtype), value)


def check_logits(logits: Array, query_weights: Masses, key_weights: Masses) -> None:
  """Raises ValueError unless the weights fit logits `[..., n, m]`."""
  check_weights("query_weights", query_weights, logits.shape[-2])
  check_weights("key_weights", key_weights, logits.shape[-1])


def row_sums(query_weights: Masses, n: Size) -> Float[Array, "... n"]:
  """Row sums r of the plan, `[..., n]`: n_valid times the masses of the queries."""
  if query_weights is None:
    return jnp.ones((n,), jnp.float32)
  if query_weights.dtype == jnp.bool_:
    return query_weights.astype(jnp.float32)
  count = (query_weights > 0).sum(-1, keepdims=True)
  return normalised(query_weights, n) * count


def column_sums(
  query_weights: Masses, key_weights: Masses, n: Size, m: Size
) -> Float[Array, "... m"]:
  """Column sums c of the plan, `[..., m]`: n_valid times the masses of the keys."""
  mask = valid(query_weights)
  if mask is None:
    return normalised(key_weights, m) * as_number(n)
  return normalised(key_weights, m) * mask.sum(-1, keepdims=True).astype(jnp.float32)


def marginals(
  query_weights: Masses, key_weights: Masses, shape: Sequence[Size], dtype: jnp.dtype
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch m"]]:
  """Row and column sums of plans of a shape `[batch..., n, m]`, of every element."""
  *batch, n, m = shape
  rows = row_sums(query_weights, n).astype(dtype)
  columns = column_sums(query_weights, key_weights, n, m).astype(dtype)
  return jnp.broadcast_to(rows, (*batch, n)), jnp.broadcast_to(columns, (*batch, m))
