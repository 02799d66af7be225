"""Time until the columns of a plan are as good as wanted, from each start."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import asap_jax
from asap_jax import metrics
from asap_jax.c_transform import closure, plan
from asap_jax.compiler.recorder import recorder
from asap_jax.compiler.sites import find_sinkhorn
from asap_jax.plotting import plot_scaling, subplots
from asap_jax.teacher.starts import Start, starting_dual
from experiments.common.replacements import call_model
from experiments.common.timing import time_interleaved
from experiments.starts.methods import ITERATIONS, STARTS

# Tokens in all, whatever the length; errors to be reached; iterations to give up after.
LENGTHS, TOKENS = (64, 256, 1024, 4096), 8192
ERRORS, MOST = (0.1, 0.03), 300


def measure(
  teacher: nnx.Module, inputs: np.ndarray, lengths: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
  """A row for each start, length and error to be reached, and for softmax.

  Also for T = 20 from zero, whatever error it leaves. Operators are those of
  `implementation="xla"`, the fastest exact form, and times those of a whole attention.

  Raises:
    ValueError: if the teacher's inputs are padded.
  """
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, call_model)
  # The last layer: its logits are the sharpest.
  (seen, *_) = record(inputs[:TOKENS])[-1]
  if seen.key_mask is not None:
    raise ValueError("inputs are padded: expected a teacher of full sequences")
  return [
    row
    for length in lengths
    for row in _measure(joined(seen.query, length), joined(seen.key, length), repeats)
  ]


def joined(points: jax.Array, length: int) -> jax.Array:
  """Sequences of another length from `[batch, heads, n, dim]`: several side by side.

  `TOKENS` tokens, or as many as there are.
  """
  batch, heads, n, dim = points.shape
  tokens = jnp.moveaxis(points, 1, 2).reshape(batch * n, heads, dim)
  count = max(1, min(TOKENS, batch * n) // length)
  tokens = tokens[: count * length].reshape(count, -1, heads, dim)
  return jnp.moveaxis(tokens, 1, 2)


def _measure(query, key, repeats):
  batch, _, length, _ = query.shape
  errors = {start: _errors(query, key, start) for start in STARTS}
  counts: dict[tuple[Start, float | None], int | None] = {
    (start, wanted): _least(errors[start], wanted)
    for start in STARTS
    for wanted in ERRORS
  }
  counts["zero", None] = ITERATIONS
  tokens = jax.block_until_ready([jnp.moveaxis(x, 1, 2) for x in (query, key, key)])
  runs: dict[tuple[str, int], Any] = {
    (start, count): _compiled(start, count, tokens)
    for (start, _), count in counts.items()
    if count is not None
  }
  softmax = functools.partial(asap_jax.softmax_attention, scale=1.0)
  runs["softmax", 0] = functools.partial(jax.jit(softmax), *tokens)
  times = time_interleaved(runs, repeats)
  common = {"part": "reach", "length": length, "batch": batch}
  rows = [
    {
      **common,
      "method": start,
      "wanted": wanted,
      "iterations": count,
      "column_error": None if count is None else errors[start][count - 1],
      "milliseconds": None if count is None else times[start, count].median,
    }
    for (start, wanted), count in counts.items()
  ]
  taken = times["softmax", 0].median
  return [*rows, {**common, "method": "softmax", "wanted": None, "milliseconds": taken}]


def _errors(query: jax.Array, key: jax.Array, start: Start) -> list[float]:
  """Column errors after 1, 2, ... iterations, up to the last that is wanted.

  Of the first sequence, which stands for all.
  """
  query, key = query[0], key[0]
  f = _started(query, key, start)
  errors: list[float] = []
  least = ITERATIONS if start == "zero" else 1
  while len(errors) < MOST and (len(errors) < least or min(errors) > min(ERRORS)):
    f, error = _iterated(query, key, f)
    errors.append(float(error))
  return errors


def _least(errors: Sequence[float], wanted: float) -> int | None:
  """The fewest iterations that leave no more than an error; `None` if none do."""
  return next((k for k, error in enumerate(errors, 1) if error <= wanted), None)


@functools.partial(jax.jit, static_argnames="start")
def _started(query, key, start):
  return starting_dual(start, query, key)


@jax.jit
def _iterated(query, key, f):
  def of_head(arguments):
    query, key, f = arguments
    closed = closure(query @ key.T, f)
    return closed.f, metrics.column_error(plan(query @ key.T, closed)).mean()

  f, errors = jax.lax.map(of_head, (query, key, f))
  return f, errors.mean()


def _compiled(start, count, tokens):
  options = {"iterations": count, "start": start, "implementation": "xla"}
  attend = functools.partial(asap_jax.sinkhorn_attention, scale=1.0, **options)
  return functools.partial(jax.jit(attend), *tokens)


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed."""

  def shown(value, form):
    return "" if value is None else format(value, form)

  return [
    {
      "method": row["method"],
      "length": row["length"],
      "wanted": shown(row.get("wanted"), "g"),
      "iterations": shown(row.get("iterations"), "d"),
      "column error": shown(row.get("column_error"), ".3f"),
      "ms": shown(row["milliseconds"], ".1f"),
    }
    for row in rows
  ]


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Time against the length, to the smaller error."""
  series: dict[tuple[str, str], list[tuple[float, float]]] = {}
  for row in rows:
    if row["milliseconds"] is None:
      continue
    if row["method"] == "softmax" or row["wanted"] == ERRORS[-1]:
      name = row["method"], ""
    elif row["wanted"] is None:
      name = "zero", f"T = {ITERATIONS}"
    else:
      continue
    series.setdefault(name, []).append((row["length"], row["milliseconds"]))
  title = f"ms to a column error of {ERRORS[-1]:g}, {TOKENS:,} tokens in all"
  axes = subplots(width=7.0, height=4.6)[0, 0]
  plot_scaling(series, axes, title=title)
  axes.figure.savefig(path, dpi=150)
