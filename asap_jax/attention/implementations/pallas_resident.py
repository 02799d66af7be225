"""Sinkhorn's iterations of one head in a TPU's fast memory, by one kernel each way.

Queries, keys and values are read once, and logits never leave the chip. The first
iteration makes a plan P whose rows are exact; the later ones scale it, f by u and g by
v, at two products of a matrix and a vector each. Where a sum leaves the range of
float32, the plan is made anew from the logits (Schmitzer, 2019, arXiv 1610.06519).
Chunks of rows keep what is computed at a time small.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from asap_jax.attention.implementations.pallas_streamed import (
  LANES,
  as_column,
  as_row,
  in_kernel,
  of_values,
  on_tpu,
  padded,
  products,
)
from asap_jax.c_transform.entropic import LOG_ZERO, Duals
from asap_jax.c_transform.iterates import Iterates

# Of queries and keys at most: two float32 matrices of so many take 8 MiB.
_LENGTH = 1024
# Of the head dimension and the iterations, whose arrays are there as well.
_DIM, _ITERATIONS = 256, 128
_VMEM_BYTES = 48 * 2**20
# A sum has lost less than 1e-7 of it to what float32 cannot hold, 1,024 addends of it.
_LEAST_SUM, _LARGEST_SCALING = 1e-27, 1e30


def fits(n: int, m: int, dim: int, features: int, iterations: int) -> bool:
  """Whether all of one head is in fast memory at once."""
  within = max(n, m) <= _LENGTH and max(dim, features) <= _DIM
  return within and iterations <= _ITERATIONS


class Iterated(NamedTuple):
  """What iterations gave, and the duals that they went through.

  Attributes:
    out: values under the plan, `[batch, n, features]`, float32.
    duals: at last; those of absent points may be anything.
    iterates: `[batch, iterations, ...]`, likewise.
  """

  out: Array
  duals: Duals
  iterates: Iterates


def iterate(
  query: Float[Array, "batch n dim"],
  key: Float[Array, "batch m dim"],
  value: Float[Array, "batch m features"],
  start: Float[Array, "batch n"],
  a: Float[Array, "batch n"],
  b: Float[Array, "batch m"],
  iterations: int,
  precision: jax.lax.PrecisionLike = None,
) -> Iterated:
  """Values under the plan of plain iterations from a query-side dual.

  Args:
    query: zero at absent points.
    key: likewise.
    value: likewise; weights are rounded to its dtype.
    start: f, float32.
    a: sums of the rows, zero at absent queries.
    b: sums of the columns, likewise.
    iterations: at least one.
    precision: of the products that make logits; `None` keeps them in float32.
  """
  n, m = query.shape[1], key.shape[1]
  arrays = _in_rows(query, key, value, start, a, b)
  of_queries, of_keys = arrays[0].shape[1], arrays[1].shape[1]
  out = _call(
    functools.partial(_iterate, iterations, precision),
    arrays,
    [
      (of_queries, value.shape[-1]),
      (1, of_queries),
      (1, of_keys),
      (iterations, 1, of_queries),
      (iterations, 1, of_keys),
    ],
    [(of_queries, of_keys)] * 2 + [(of_queries, 1)] * 3,
  )
  out, f, g, fs, gs = out
  duals = Duals(f[:, 0, :n], g[:, 0, :m])
  return Iterated(out[:, :n], duals, Iterates(fs[:, :, 0, :n], gs[:, :, 0, :m]))


class Cotangents(NamedTuple):
  """Of the arguments of `iterate`."""

  query: Array
  key: Array
  value: Array
  start: Array
  a: Array
  b: Array


def cotangents(
  query: Float[Array, "batch n dim"],
  key: Float[Array, "batch m dim"],
  value: Float[Array, "batch m features"],
  a: Float[Array, "batch n"],
  b: Float[Array, "batch m"],
  duals: Duals,
  iterates: Iterates,
  out_bar: Float[Array, "batch n features"],
  precision: jax.lax.PrecisionLike = None,
) -> Cotangents:
  """Of everything that `iterate` is a function of, from those of its values.

  The formulas are those of `asap_jax.attention.implementations.sweeps_back`, with one
  exponential of a pair an iteration.
  """
  n, m, count = query.shape[1], key.shape[1], iterates.f.shape[1]
  f, fs = (
    padded(x, LANES, axis=x.ndim - 1, with_=LOG_ZERO) for x in (duals.f, iterates.f)
  )
  g, gs = (
    padded(x, LANES, axis=x.ndim - 1, with_=LOG_ZERO) for x in (duals.g, iterates.g)
  )
  query, key, value, f, a, b = _in_rows(query, key, value, f, a, b)
  arrays = query, key, value, f, a, b, g[:, None], fs[:, :, None], gs[:, :, None]
  out_bar = padded(out_bar.astype(jnp.float32), LANES, axis=1)
  of_queries, of_keys = query.shape[1], key.shape[1]
  found = _call(
    functools.partial(_go_back, count, precision),
    (*arrays, out_bar),
    [
      query.shape[1:],
      key.shape[1:],
      value.shape[1:],
      *((1, of_queries), (1, of_queries), (1, of_keys)),
    ],
    [(of_queries, of_keys)] * 2 + [(of_queries, 1)] * 2,
  )
  query, key, value, start, a, b = found
  sums = start[:, 0, :n], a[:, 0, :n], b[:, 0, :m]
  return Cotangents(query[:, :n], key[:, :m], value[:, :m], *sums)


def _in_rows(query, key, value, f, a, b):
  """Arrays whose points are a multiple of the lanes; what is more is absent."""
  tokens = (padded(x, LANES, axis=1) for x in (query, key, value))
  return *tokens, *(padded(x, LANES, axis=1)[:, None] for x in (f, a, b))


def _call(kernel, arrays, out_shapes, scratch_shapes):
  """A kernel of one element of the batch at a time."""
  batch = arrays[0].shape[0]

  def whole(shape):
    return pl.BlockSpec((None, *shape), lambda b: (b, *(0 for _ in shape)))

  call = functools.partial(
    pl.pallas_call,
    kernel,
    grid=(batch,),
    in_specs=[whole(x.shape[1:]) for x in arrays],
    out_specs=[whole(shape) for shape in out_shapes],
    out_shape=[jax.ShapeDtypeStruct((batch, *s), jnp.float32) for s in out_shapes],
    scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch_shapes],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
    ),
  )
  return on_tpu(call, *arrays)


def _iterate(
  iterations, precision, query, key, value, start, a, b, out, f_out, g_out, fs, gs,
  logits, kernel, f, anchor, sums_of_rows,
):  # fmt: skip
  by_rows = functools.partial(_by_rows, logits.shape[0])
  nothing = jnp.zeros_like(b)

  def keys_dual():
    """The c-transform of f, in the log domain."""

    def add(rows, largest, total):
      scores = logits[rows] + f[rows]
      new = jnp.maximum(largest, scores.max(0, keepdims=True))
      own = jnp.exp(scores - new).sum(0, keepdims=True)
      return new, total * jnp.exp(largest - new) + own

    largest, total = by_rows(add, jnp.full_like(nothing, LOG_ZERO), nothing)
    return _present(_log(b[...]) - largest - jnp.log(total), b[...])

  def fitted(rows, g):
    """Rows of the plan that are exact, and the f that makes them so."""
    scores, sums = logits[rows] + g, sums_of_rows[rows]
    largest = scores.max(1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(1, keepdims=True)
    return weights * (sums / total), _present(_log(sums / total) - largest, sums)

  def made(g):
    """Makes the plan; its columns' sums, its g and the largest scaling of a row."""

    def add(rows, sums):
      plan, dual = fitted(rows, g)
      kernel[rows], f[rows], anchor[rows] = plan, dual, dual
      return (sums + plan.sum(0, keepdims=True),)

    (sums,) = by_rows(add, nothing)
    return sums, g, jnp.float32(1.0)

  def scaled(g, base):
    """Scales the plan, whose g was another one; and whether it was near enough."""
    v = jnp.exp(g - base)

    def add(rows, sums, least, largest):
      plan, own = kernel[rows], sums_of_rows[rows]
      total = (plan * v).sum(1, keepdims=True)
      u = jnp.where(own > 0, own / total, 0.0)
      f[rows] = _present(anchor[rows] + _log(u), own)
      least = jnp.minimum(least, jnp.where(own > 0, total, jnp.inf).min())
      sums = sums + (plan * u).sum(0, keepdims=True)
      return sums, least, jnp.maximum(largest, u.max())

    sums, least, largest = by_rows(add, nothing, jnp.float32(jnp.inf), jnp.float32(0))
    return (sums, base, largest), _near(least, v.max())

  def kept(t, sums, base, largest):
    """g from the columns' sums; keeps it, and the f that they are of."""
    least = jnp.where(b[...] > 0, sums, jnp.inf).min()
    g = jax.lax.cond(
      _near(least, largest),
      lambda: _present(base + _log(b[...]) - _log(sums), b[...]),
      keys_dual,
    )

    def keep(rows):
      fs[t, :, rows] = as_row(f[rows])
      return ()

    by_rows(keep)
    gs[t] = g
    return g, base

  def turn(t, carry):
    g, base = carry
    found, near = scaled(g, base)
    return kept(t, *jax.lax.cond(near, lambda: found, lambda: made(g)))

  def prepare(rows):
    logits[rows] = products(query[rows], key[...], in_kernel(precision))
    sums_of_rows[rows] = as_column(a[:, rows])
    f[rows] = _present(as_column(start[:, rows]), sums_of_rows[rows])
    return ()

  by_rows(prepare)
  fs[0], gs[0] = start[...], keys_dual()
  g = gs[0]
  if iterations > 1:
    g, _ = jax.lax.fori_loop(2, iterations, turn, kept(1, *made(g)))

  def finish(rows):
    plan, dual = fitted(rows, g)
    values = plan.astype(value.dtype), value[...]
    out[rows] = products(*values, of_values(precision), (1, 0))
    f_out[:, rows] = as_row(dual)
    return ()

  by_rows(finish)
  g_out[...] = g


def _go_back(
  count, precision, query, key, value, f, a, b, g, fs, gs, out_bar,
  query_bar, key_bar, value_bar, start_bar, a_bar, b_bar,
  logits, logits_bar, sums_of_rows, row_bars,
):  # fmt: skip
  by_rows = functools.partial(_by_rows, logits.shape[0])
  precision = in_kernel(precision)
  for bar in (key_bar, value_bar, b_bar):
    bar[...] = jnp.zeros_like(bar)

  def from_values(rows, g_bar):
    logits[rows] = products(query[rows], key[...], precision)
    sums_of_rows[rows] = own = as_column(a[:, rows])
    dual = _present(as_column(f[:, rows]), own)
    plan = jnp.exp(logits[rows] + dual + g[...])
    plan_bar = products(out_bar[rows], value[...].astype(jnp.float32), precision)
    part = _divided((plan * plan_bar).sum(1, keepdims=True), own)
    value_bar[...] += products(plan, out_bar[rows], precision, (0, 0))
    logits_bar[rows] = bar = plan * (plan_bar - part)
    row_bars[rows] = part
    return (g_bar + bar.sum(0, keepdims=True),)

  def turn(i, carry):
    (g_bar,) = carry
    t = count - 1 - i
    g, before = gs[t], gs[jnp.maximum(t - 1, 0)]
    column_part = _divided(g_bar, b[...])
    moved = jnp.exp(before - g)
    is_later = (t > 0).astype(jnp.float32)  # the first f is given, not made from a g

    def add(rows, sums):
      own = sums_of_rows[rows]
      dual = _present(as_column(fs[t, :, rows]), own)
      between = jnp.exp(logits[rows] + dual + g)
      part = -_divided((between * column_part).sum(1, keepdims=True), own)
      logits_bar[rows] -= between * (is_later * part * moved + column_part)
      row_bars[rows] += is_later * part
      start_bar[:, rows] = as_row(own * part)  # that of the first is the last
      return (sums + (between * part).sum(0, keepdims=True),)

    b_bar[...] += column_part
    (sums,) = by_rows(add, jnp.zeros_like(b))
    return (-moved * sums,)

  def to_tokens(rows):
    query_bar[rows] = products(logits_bar[rows], key[...], precision, (1, 0))
    key_bar[...] += products(logits_bar[rows], query[rows], precision, (0, 0))
    a_bar[:, rows] = as_row(row_bars[rows])
    return ()

  jax.lax.fori_loop(0, count, turn, by_rows(from_values, jnp.zeros_like(b)))
  by_rows(to_tokens)


def _by_rows(total: int, step: Any, *start: Any) -> tuple[Any, ...]:
  """`step(rows, *carry)` of one chunk of rows after another."""

  def run(i, carry):
    return step(pl.ds(pl.multiple_of(i * LANES, LANES), LANES), *carry)

  return jax.lax.fori_loop(0, total // LANES, run, start)


def _near(least_sum: Array, largest_scaling: Array) -> Array:
  """Whether sums of a scaled plan have lost nothing that counts."""
  least = _LEAST_SUM * jnp.maximum(largest_scaling, 1.0)
  return (least_sum >= least) & (largest_scaling <= _LARGEST_SCALING)


def _present(dual: Array, sums: Array) -> Array:
  return jnp.where(sums > 0, dual, LOG_ZERO)


def _divided(bars: Array, sums: Array) -> Array:
  return jnp.where(sums > 0, bars / jnp.where(sums > 0, sums, 1.0), 0.0)


def _log(sums: Array) -> Array:
  return jnp.log(jnp.where(sums > 0, sums, 1.0))
