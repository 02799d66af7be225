"""Doubly stochastic attention by kernels for a TPU: no n x m matrix in its memory.

Plain iterations of up to 1,024 tokens run in one kernel forward and one backward, which
hold the matrix of one head in fast memory (`pallas_resident`). All else takes a kernel
every half-iteration, and one for the values (`pallas_streamed`). Nothing here has been
timed on a TPU.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations import pallas_resident, streamed
from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.pallas_streamed import averages, log_sums
from asap_jax.attention.implementations.sweeps import absent_low
from asap_jax.c_transform.entropic import (
  Duals,
  advance,
  by_closure,
  check_closures,
  marginals,
)
from asap_jax.c_transform.iterates import Iterates
from asap_jax.masses import Masses, Side, check_weights, zero_invalid
from asap_jax.numerics import with_usual_promotion


class _Static(NamedTuple):
  """What is not an array: hashable, for `jax.custom_vjp`."""

  count: int  # type: ignore[assignment]  # also a method of tuples
  side: Side
  precision: Any


def pallas_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  dual: Float[Array, "..."],
  count: int = 1,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  bias: None = None,
  relaxation: Float[Array, "..."] | None = None,
  momentum: Float[Array, "..."] | None = None,
  side: Side = "query",
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures from f, by kernels for a TPU.

  The same function as `scaled_attention` in O(n + m) memory, forward and backward. On
  other devices the kernels are interpreted, which is right and slow. Works under jit,
  vmap and grad, in reverse mode only. Plain closures keep the dual of each,
  O(count (n + m)), for their gradient. Up to 1,024 tokens, a head dimension of 256 and
  128 closures they are one kernel, and so is their gradient; beyond that it is that of
  `streamed_attention`, and of other closures that of `chunked_attention`, in plain XLA.

  Args:
    query: see `scaled_attention`, as all arguments not listed here; float32.
    key: likewise.
    value: `[..., m, features]`, float32, bfloat16 or float16.
    dual: likewise.
    count: likewise.
    query_weights: likewise.
    key_weights: likewise.
    bias: not supported: a bias is an n x m matrix.
    relaxation: likewise.
    momentum: likewise.
    side: likewise.
    precision: of the products; a kernel knows only the default and float32, so that all
      but the former are the latter.

  Returns:
    As `scaled_attention`.

  Raises:
    ValueError: for a bias or a dtype that kernels do not take; else as
      `scaled_attention`.
  """
  reason = unsupported(query, key, value, bias)
  if reason is not None:
    raise ValueError(reason)
  check_closures(count, relaxation, momentum, side)
  n, m = query.shape[-2], key.shape[-2]
  check_weights("query_weights", query_weights, n)
  check_weights("key_weights", key_weights, m)
  batch = query.shape[:-2]

  def flat(array, *own):
    array = jnp.broadcast_to(array, (*batch, *own))
    return array.reshape(-1, *own)

  def flat_or_none(array, *own):
    return None if array is None else flat(array, *own)

  own_weights, size = (query_weights, n) if side == "query" else (key_weights, m)
  tokens = (
    flat(zero_invalid(x, weights, axis=-2), *x.shape[-2:])
    for x, weights in ((query, query_weights), (key, key_weights), (value, key_weights))
  )
  dual = flat(zero_invalid(dual.astype(jnp.float32), own_weights), size)
  static = _Static(count, side, precision)
  if side == "query" and relaxation is None and momentum is None:
    sums = marginals(query_weights, key_weights, (*batch, n, m), dual.dtype)
    out = _iterate(static, *tokens, dual, *(flat(x, x.shape[-1]) for x in sums))
  else:
    weights = flat_or_none(query_weights, n), flat_or_none(key_weights, m)
    factors = (flat_or_none(x, max(count - 1, 0)) for x in (relaxation, momentum))
    out = _attend(static, *tokens, dual, *weights, *factors)
  return out.reshape(*batch, *out.shape[1:])


def unsupported(
  query: Array, key: Array, value: Array, bias: Array | None
) -> str | None:
  """Why no kernel can serve these arguments, or `None`."""
  dtypes = {str(x.dtype) for x in (query, key, value)}
  if not dtypes <= {"float32", "bfloat16", "float16"}:
    return (
      f"query, key, value have dtype {', '.join(sorted(dtypes))}: kernels take "
      "float32, bfloat16 or float16; pass implementation='chunked'"
    )
  if bias is not None:
    return "bias: kernels take none; expected None, or pass implementation='chunked'"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _iterate(static: _Static, *arguments: Array) -> Array:
  """Plain iterations from f; of tokens, f, and sums of rows and columns."""
  return _iterate_forward(static, *arguments)[0]


def _iterate_forward(static, query, key, value, start, a, b):
  arguments = query, key, value, start, a, b
  if _is_resident(static, query, key, value):
    out, duals, iterates = pallas_resident.iterate(
      query, key, _wide(value), start, a, b, static.count, static.precision
    )
  else:
    out, duals, iterates = _closed(static, *arguments, None, None)
    iterates = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), iterates)
  out = jnp.where(a[..., None] > 0, out, 0.0)
  # As in `asap_jax.teacher.sinkhorn`: residuals that are inputs are mixed up in loops.
  kept = jax.lax.optimization_barrier((arguments, (out, duals, iterates)))
  return out.astype(value.dtype), kept


@with_usual_promotion
def _iterate_backward(static, kept, out_bar):
  arguments, (_, duals, iterates) = kept
  query, key, value, _, a, b = arguments
  if not _is_resident(static, query, key, value):
    options = static.count, None, static.precision
    of_all = streamed.backward(options, ((*arguments, None, None), kept[1]), out_bar)
    return of_all[1:-2]
  bars = pallas_resident.cotangents(
    *(query, key, _wide(value), a, b, duals, iterates, out_bar), static.precision
  )
  return tuple(x.astype(y.dtype) for x, y in zip(bars, arguments, strict=True))


_iterate.defvjp(_iterate_forward, _iterate_backward)


def _is_resident(static: _Static, query: Array, key: Array, value: Array) -> bool:
  (n, dim), (m, features) = query.shape[1:], value.shape[1:]
  return pallas_resident.fits(n, m, dim, features, static.count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays: Any) -> Array:
  """Any closures; of tokens, the dual, weights of both sides and factors."""
  query, key, value, dual, rows, columns, *factors = arrays
  a, b = marginals(rows, columns, (*query.shape[:2], key.shape[1]), dual.dtype)
  out = _closed(static, query, key, value, dual, a, b, *factors)[0]
  return jnp.where(a[..., None] > 0, out, 0.0).astype(value.dtype)


def _attend_forward(static, *arrays):
  return _attend(static, *arrays), jax.lax.optimization_barrier(arrays)


@with_usual_promotion
def _attend_backward(static, arrays, out_bar):
  def chunked(query, key, value, dual, *rest):
    *weights, relaxation, momentum = rest
    return chunked_attention(
      *(query, key, value, dual, static.count, *weights),
      relaxation=relaxation,
      momentum=momentum,
      side=static.side,
      precision=static.precision,
    )

  return jax.vjp(chunked, *arrays)[1](out_bar)


_attend.defvjp(_attend_forward, _attend_backward)


def _closed(static, query, key, value, dual, a, b, relaxation, momentum):
  """Values, duals and iterates of closures, a kernel for every half of one."""
  half = functools.partial(_half, precision=static.precision)
  to_keys = functools.partial(half, key, query, b, a)

  def step(carry, factors):
    f, before = carry
    g = to_keys(f)
    moved = advance(before, f, half(query, key, a, b, g), *factors)
    return (moved, f), Iterates(f, g)

  g, iterates = dual, None
  if static.count > 0:
    f = dual if static.side == "query" else half(query, key, a, b, dual)
    factors = by_closure(relaxation, momentum, dual.dtype)
    (f, _), iterates = jax.lax.scan(step, (f, f), factors, static.count - 1)
    g = to_keys(f)
    last = Iterates(f, g)
    iterates = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), iterates, last)
  low = absent_low(g, b)
  logs, out = averages(query, key, low, _wide(value), static.precision)
  return a[..., None] * out, Duals(_dual(logs, a), g), iterates


def _half(target, source, sums, source_sums, dual, precision):
  """The dual of one side from that of the other."""
  logs = log_sums(target, source, absent_low(dual, source_sums), precision)
  return _dual(logs, sums)


def _dual(logs: Array, sums: Array) -> Array:
  return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1.0)) - logs, 0.0)


def _wide(value: Array) -> Array:
  """A TPU multiplies no float16, whose range is too small for weights anyway."""
  return value.astype(jnp.float32) if value.dtype == jnp.float16 else value
