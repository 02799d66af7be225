"""Sums over all points of one side, by kernels for a TPU that hold one tile of scores.

Both are one fold: a block of targets meets the sources block by block, and keeps the
largest score so far and the sum of exponentials below it. `log_sums` gives a dual, half
an iteration; `averages` weighs values as well, flash attention with a dual of the keys.
(Milakov and Gimelshein, 2018, arXiv 1805.02867; Dao et al., 2022, arXiv 2205.14135.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import LOG_ZERO

# Points of a block at most: a tile of scores takes 1 MiB of a TPU's fast memory, and so
# does everything of its size that a step makes.
_BLOCK = 512
# Of the last axis of a TPU's registers: blocks are a multiple of it.
LANES = 128


def log_sums(
  target: Float[Array, "batch n dim"],
  source: Float[Array, "batch m dim"],
  dual: Float[Array, "batch m"],
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "batch n"]:
  """log sum_j exp(<target_i, source_j> + dual_j), without a matrix of all pairs.

  Args:
    target: points.
    source: points; those that are absent have a dual far below all others.
    dual: float32.
    precision: of the products; `None` keeps them in float32.
  """
  n = target.shape[1]
  own, others = block_of(n), block_of(source.shape[1])
  target, source, dual = _padded(target, source, dual, own, others)
  return _folded(target, source, dual, None, own, others, precision)[0][:, 0, :n]


def averages(
  target: Float[Array, "batch n dim"],
  source: Float[Array, "batch m dim"],
  dual: Float[Array, "batch m"],
  value: Float[Array, "batch m features"],
  precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "batch n"], Float[Array, "batch n features"]]:
  """`log_sums`, and values weighted by the softmax of the scores, float32.

  Args:
    target: see `log_sums`, as all arguments not listed here.
    source: likewise.
    dual: likewise.
    value: of the sources; weights are rounded to its dtype.
    precision: likewise.
  """
  n = target.shape[1]
  own, others = block_of(n), block_of(source.shape[1])
  target, source, dual = _padded(target, source, dual, own, others)
  value = padded(value, others, axis=1)
  logs, out = _folded(target, source, dual, value, own, others, precision)
  return logs[:, 0, :n], out[:, :n]


def block_of(size: int) -> int:
  """Points of a block: as few blocks as can be, with as little padding."""
  blocks = -(-size // _BLOCK)
  return -(-size // (blocks * LANES)) * LANES


def padded(array: Array, block: int, *, axis: int, with_: float = 0.0) -> Array:
  """An array whose axis is a multiple of a block."""
  surplus = -array.shape[axis] % block
  widths = [(0, surplus * (i == axis)) for i in range(array.ndim)]
  return jnp.pad(array, widths, constant_values=with_)


def products(
  left: Array, right: Array, precision: Any, axes: tuple[int, int] = (1, 1)
) -> Array:
  """Products of two matrices in a kernel, summed over an axis of each, float32.

  Those of bfloat16 are exact as they are, and no other precision is known there.
  """
  if left.dtype == right.dtype == jnp.bfloat16:
    precision = None
  return jax.lax.dot_general(
    left,
    right,
    (((axes[0],), (axes[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def in_kernel(precision: jax.lax.PrecisionLike) -> jax.lax.Precision:
  """The precision of products that make logits: a kernel knows only two."""
  lowest = precision in (jax.lax.Precision.DEFAULT, "default", "fastest", "bfloat16")
  return jax.lax.Precision.DEFAULT if lowest else jax.lax.Precision.HIGHEST


def of_values(precision: jax.lax.PrecisionLike) -> jax.lax.Precision | None:
  """The precision of products with values: the device's own, unless one is named."""
  return None if precision is None else in_kernel(precision)


def as_row(column: Array) -> Array:
  """`[n, 1]` as `[1, n]`, in a kernel."""
  return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def as_column(row: Array) -> Array:
  """`[1, n]` as `[n, 1]`, in a kernel."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def on_tpu(call: Callable[..., Any], *arrays: Array) -> Any:
  """`call(interpret)` of arrays: a kernel for a TPU, interpreted elsewhere."""
  return jax.lax.platform_dependent(
    *arrays, tpu=call(interpret=False), default=call(interpret=True)
  )


def _padded(target, source, dual, own, others):
  return (
    padded(target, own, axis=1),
    padded(source, others, axis=1),
    padded(dual, others, axis=1, with_=LOG_ZERO)[:, None],
  )


def _folded(target, source, dual, value, own, others, precision):
  """Logarithms of sums, `[batch, 1, n]`, and averages where there are values."""
  batch, n, dim = target.shape
  m = source.shape[1]
  arrays = [target, source, dual]
  in_specs = [
    pl.BlockSpec((None, own, dim), lambda b, i, j: (b, i, 0)),
    pl.BlockSpec((None, others, dim), lambda b, i, j: (b, j, 0)),
    pl.BlockSpec((None, 1, others), lambda b, i, j: (b, 0, j)),
  ]
  out_shape = [jax.ShapeDtypeStruct((batch, 1, n), jnp.float32)]
  out_specs = [pl.BlockSpec((None, 1, own), lambda b, i, j: (b, 0, i))]
  if value is not None:
    features = value.shape[-1]
    arrays.append(value)
    in_specs.append(pl.BlockSpec((None, others, features), lambda b, i, j: (b, j, 0)))
    out_shape.append(jax.ShapeDtypeStruct((batch, n, features), jnp.float32))
    out_specs.append(pl.BlockSpec((None, own, features), lambda b, i, j: (b, i, 0)))
  call = functools.partial(
    pl.pallas_call,
    functools.partial(_fold if value is None else _fold_values, precision),
    grid=(batch, n // own, m // others),
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM((own, 1), jnp.float32)] * 2,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
  )
  return on_tpu(call, *arrays)


def _fold(precision, target, source, dual, logs, largest, total):
  _begin(largest, total)
  _add(_scores(precision, target, source, dual), largest, total)
  _end(logs, largest, total)


def _fold_values(precision, target, source, dual, value, logs, out, largest, total):
  _begin(largest, total, out)
  weights, kept = _add(_scores(precision, target, source, dual), largest, total)
  values = weights.astype(value.dtype), value[...]
  own = products(*values, of_values(precision), (1, 0))
  out[...] = kept * out[...] + own
  _end(logs, largest, total, out)


def _scores(precision, target, source, dual):
  return products(target[...], source[...], in_kernel(precision)) + dual[...]


def _begin(largest, total, *sums):
  @pl.when(pl.program_id(2) == 0)
  def _():
    largest[...] = jnp.full_like(largest, LOG_ZERO)
    for each in (total, *sums):
      each[...] = jnp.zeros_like(each)


def _add(scores, largest, total):
  """Weights of the scores below the largest, and what is kept of the sums before."""
  new = jnp.maximum(largest[...], scores.max(1, keepdims=True))
  weights, kept = jnp.exp(scores - new), jnp.exp(largest[...] - new)
  largest[...] = new
  total[...] = kept * total[...] + weights.sum(1, keepdims=True)
  return weights, kept


def _end(logs, largest, total, *sums):
  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    logs[...] = as_row(largest[...] + jnp.log(total[...]))
    for each in sums:
      each[...] = each[...] / total[...]
