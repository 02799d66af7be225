"""Doubly stochastic attention by calls of cuDNN's fused attention: no n x m matrix.

Every half-iteration is one fused call, and so is the product with the values; how is in
`asap_jax.attention.implementations.cudnn_sums`. What a call has to say fits 16 bits
only in a range: where logits or duals differ by more than about 70 (7 in float16),
everything is done by `chunked_attention` instead.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.cudnn_sums import (
  DTYPES,
  Fused,
  fits,
  transform,
  values,
)
from asap_jax.c_transform.entropic import (
  advance,
  by_closure,
  check_closures,
  column_sums,
  row_sums,
)
from asap_jax.masses import Masses, Side, check_weights, zero_invalid
from asap_jax.numerics import float_dtype, with_usual_promotion


class _Static(NamedTuple):
  """What is not an array: hashable, for `jax.custom_vjp`."""

  count: int  # type: ignore[assignment]  # also a method of tuples
  side: Side
  scale: float
  precision: Any
  fused: Fused


def fused_attention(query: Array, key: Array, value: Array, scale: float) -> Array:
  """Softmax attention by cuDNN, `[batch, length, heads, dim]`."""
  return jax.nn.dot_product_attention(
    query, key, value, scale=scale, implementation="cudnn"
  )


def cudnn_attention(
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
  scale: float = 1.0,
  fused: Fused = fused_attention,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures from f, by 2 `count` fused calls.

  The same function as `scaled_attention` in O(n + m) memory, forward and
  backward: the backward pass is that of `chunked_attention`, so in plain XLA. Works
  under jit, vmap and grad; forward mode (`jax.jvp`) is not supported. Duals are exact
  to about 1e-3, weights and values are rounded as in any attention of that dtype.

  Args:
    query: `[..., n, dim]`, bfloat16 or float16, not multiplied by the scale.
    key: `[..., m, dim]`, of the same dtype.
    value: `[..., m, features]`, of the same dtype.
    dual: see `scaled_attention`, as all arguments not listed here.
    count: likewise.
    query_weights: likewise.
    key_weights: likewise.
    bias: not supported: a bias is an n x m matrix, and the kernel takes none per key.
    relaxation: see `scaled_attention`.
    momentum: likewise.
    side: likewise.
    precision: of the products of the backward pass.
    scale: of the logits, not zero; a Python number, part of the kernel.
    fused: the fused attention to call.

  Returns:
    As `scaled_attention`.

  Raises:
    ValueError: for a dtype, a bias or a scale that the kernel does not take; else as
      `scaled_attention`.
  """
  reason = unsupported(query, key, value, bias, scale)
  if reason is not None:
    raise ValueError(reason)
  check_closures(count, relaxation, momentum, side)
  n, m = query.shape[-2], key.shape[-2]
  check_weights("query_weights", query_weights, n)
  check_weights("key_weights", key_weights, m)
  batch = query.shape[:-2]

  def spread(array, size):
    return None if array is None else jnp.broadcast_to(array, (*batch, size))

  static = _Static(count, side, float(scale), precision, fused)
  return _attend(
    static,
    zero_invalid(query, query_weights, axis=-2),
    zero_invalid(key, key_weights, axis=-2),
    zero_invalid(value, key_weights, axis=-2),
    spread(dual, n if side == "query" else m),
    spread(query_weights, n),
    spread(key_weights, m),
    spread(relaxation, max(count - 1, 0)),
    spread(momentum, max(count - 1, 0)),
  )


def unsupported(
  query: Array, key: Array, value: Array, bias: Array | None, scale: Any
) -> str | None:
  """Why no call of the kernel can serve these arguments, or `None`."""
  dtypes = {str(x.dtype) for x in (query, key, value)}
  if len(dtypes) > 1 or not dtypes <= set(DTYPES):
    return (
      f"query, key, value have dtype {', '.join(sorted(dtypes))}: cuDNN takes bfloat16 "
      "or float16, the same for all three; pass dtype=jnp.bfloat16, or "
      "implementation='chunked'"
    )
  if bias is not None:
    return (
      "bias: cuDNN takes none that goes with duals; expected None, or pass "
      "implementation='chunked'"
    )
  if isinstance(scale, jax.core.Tracer) or scale == 0:
    return (
      f"scale={scale}: cuDNN takes a Python number that is not zero; bind it outside "
      "of jit, or pass implementation='chunked'"
    )
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, *arrays: Array | None) -> Array:
  # Axes that vmap adds become batch axes: the kernel has rules of its own for them,
  # which do not take arrays that lack the axis, and a branch would become a select.
  attend = jax.custom_batching.custom_vmap(functools.partial(_forward, static))

  @attend.def_vmap
  def _(size, mapped, *arrays):
    arrays = jax.tree.map(
      lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape)),
      list(arrays),
      list(mapped),
    )
    return _attend(static, *arrays), True

  return attend(*arrays)


def _attend_forward(static, *arrays):
  # As in `asap_jax.teacher.sinkhorn`: residuals that are inputs are mixed up in loops.
  return _attend(static, *arrays), jax.lax.optimization_barrier(arrays)


@with_usual_promotion
def _attend_backward(static, arrays, cotangent):
  _, pull = jax.vjp(functools.partial(_chunked, static), *arrays)
  return pull(cotangent)


_attend.defvjp(_attend_forward, _attend_backward)


def _chunked(
  static: _Static,
  query: Array,
  key: Array,
  value: Array,
  dual: Array,
  *rest: Array | None,
) -> Array:
  """The same in plain XLA, for gradients and where shares leave their range."""
  *weights, relaxation, momentum = rest
  wide = float_dtype(dual)
  return chunked_attention(
    query.astype(wide) * static.scale,
    key.astype(wide),
    value,
    dual,
    static.count,
    *weights,
    relaxation=relaxation,
    momentum=momentum,
    side=static.side,
    precision=static.precision,
  )


def _forward(
  static: _Static,
  query: Array,
  key: Array,
  value: Array,
  dual: Array,
  *rest: Array | None,
) -> Array:
  in_xla = functools.partial(_chunked, static, query, key, value, dual, *rest)
  query_weights, key_weights, relaxation, momentum = rest
  n, m = query.shape[-2], key.shape[-2]
  dual = dual.astype(jnp.float32)
  rows = jnp.broadcast_to(row_sums(query_weights, n), (*dual.shape[:-1], n))
  columns = column_sums(query_weights, key_weights, n, m)
  columns = jnp.broadcast_to(columns, (*dual.shape[:-1], m))
  half = functools.partial(transform, static.fused, scale=static.scale)
  to_keys = functools.partial(half, query, key, rows, columns)
  to_queries = functools.partial(half, key, query, columns, rows)

  def step(carry, factors):
    f, before, exact = carry
    g, exact_keys = to_keys(f)
    closed, exact_queries = to_queries(g)
    moved = advance(before, f, closed, *factors)
    return (moved, f, exact & exact_keys & exact_queries), None

  f, exact = dual, jnp.ones((), bool)
  if static.side == "key":
    g = dual
    if static.count > 0:
      f, exact = to_queries(g)
    else:
      exact = fits(g, columns, query.dtype, static.scale)
  if static.count > 1:
    factors = by_closure(relaxation, momentum, jnp.dtype(jnp.float32))
    carry, _ = jax.lax.scan(step, (f, f, exact), factors, length=static.count - 1)
    f, _, exact = carry
  if static.count > 0:
    g, exact_keys = to_keys(f)
    exact = exact & exact_keys
  return jax.lax.cond(
    exact,
    lambda: values(static.fused, query, key, value, g, rows, columns, static.scale),
    in_xla,
  )
