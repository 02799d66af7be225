"""What a start takes by itself, in units of the fastest softmax attention."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import asap_jax
from asap_jax.teacher.starts import starting_dual
from experiments.common.padding import pairs_of, ragged
from experiments.common.timing import time_interleaved
from experiments.starts.methods import STARTS

SHAPES = ((64, 3, 64, 64), (32, 4, 256, 32), (1, 8, 1024, 64))


def measure(
  shapes: Sequence[tuple[int, int, int, int]], repeats: int, seed: int
) -> list[dict[str, Any]]:
  """A row for each softmax, and for each start, of each shape; full and padded.

  A padded batch has sequences of a quarter of the length to all of it.
  """
  rows = []
  for shape in shapes:
    for padded in (False, True):
      rows += _measure(shape, padded, repeats, seed)
  return rows


def _measure(shape, padded, repeats, seed):
  batch, heads, length, dim = shape
  drawn = jax.random.normal(jax.random.key(seed), (3, batch, length, heads, dim))
  inputs = tuple(drawn)
  query, key = (jnp.moveaxis(x, -2, -3) for x in inputs[:2])
  query = query * dim**-0.5
  mask: jax.Array | None = None
  weights: tuple[jax.Array | None, ...] = (None, None)
  if padded:
    valid = ragged(batch, length)
    mask = pairs_of(valid)
    weights = (valid[:, None],) * 2
  softmaxes = {
    "softmax": asap_jax.softmax_attention,
    "softmax, Flax": nnx.dot_product_attention,
    "softmax, jax.nn": jax.nn.dot_product_attention,
  }
  runs = {
    name: _compiled(functools.partial(function, mask=mask), *inputs)
    for name, function in softmaxes.items()
  }
  for start in STARTS:
    if start != "zero":
      dual = functools.partial(starting_dual, start)
      runs[start] = _compiled(dual, query, key, *weights)
  times = time_interleaved(runs, repeats)
  fastest = min(times[name].median for name in softmaxes)
  return [
    {
      "part": "cost",
      "method": name,
      "batch": batch,
      "heads": heads,
      "length": length,
      "head_dim": dim,
      "padded": padded,
      "milliseconds": taken.median,
      "quartiles": list(taken.quartiles),
      "ratio_to_softmax": taken.median / fastest,
    }
    for name, taken in times.items()
  ]


def _compiled(function, *arguments):
  run = jax.jit(function).lower(*arguments).compile()
  return functools.partial(run, *arguments)


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed."""
  return [
    {
      "method": row["method"],
      "shape": "{batch}, {heads}, {length}, {head_dim}".format(**row)
      + (", padded" if row["padded"] else ""),
      "ms": f"{row['milliseconds']:.2f}",
      "of softmax": f"{row['ratio_to_softmax']:.2f}",
    }
    for row in rows
  ]
