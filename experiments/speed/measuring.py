"""Time and memory of candidates on one shape."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.common.timing import Laps, Times, temp_bytes, time_interleaved
from experiments.speed.methods import Candidate, candidates
from experiments.speed.problem import Problem

GIB = 2**30


def measure(
  problem: Problem, methods: Sequence[str], repeats: int, dense_gib: float, laps: Laps
) -> tuple[list[dict[str, Any]], list[str]]:
  """Rows of one shape, and the reasons why others are missing."""
  kept = []
  left_out: dict[str, dict[str, None]] = {}
  for candidate in candidates(problem, methods):
    reason, lowered = candidate.unavailable, None
    gib = candidate.matrices * problem.shape.matrix_bytes / GIB
    if reason is None and gib > dense_gib:
      reason = f"n x m matrices of {gib:.1f} GiB, over --dense-gib {dense_gib:g}"
    if reason is None:
      try:
        function = jax.jit(candidate.function)
        lowered = function.lower(
          *problem.inputs, *candidate.arguments, mask=problem.mask
        )
      # An implementation that cannot serve says so; nothing is run or allocated yet.
      except (ValueError, RuntimeError) as error:
        reason = str(error)
    if reason is None:
      kept.append((candidate, lowered))
    else:
      name = f"{candidate.method} {candidate.implementation}"
      left_out.setdefault(reason, {})[name] = None
  size = "{} x {} x {}".format(*problem.shape) + problem.shape.padded * " padded"
  reasons = [f"skipped at {size}: {', '.join(n)}: {why}" for why, n in left_out.items()]
  compiled = _compile([lowered for _, lowered in kept], problem.device)
  laps.end("compile")
  calls = {
    index: functools.partial(
      run, *problem.inputs, *candidate.arguments, mask=problem.mask
    )
    for index, ((candidate, _), run) in enumerate(zip(kept, compiled, strict=True))
  }
  queued = problem.device != "cpu"
  times = time_interleaved(calls, repeats, problem.seed, queued=queued)
  rows = [
    _row(problem, candidate, times[index], temp_bytes(compiled[index]))
    for index, (candidate, _) in enumerate(kept)
  ]
  laps.end("evaluate")
  return with_ratios(rows), reasons


def _compile(lowered: Sequence[Any], device: str) -> list[Callable[..., Any]]:
  # Elsewhere compiling times kernels to choose among them: one at a time.
  workers = os.cpu_count() if device == "cpu" else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(lambda each: each.compile(), lowered))


def _row(
  problem: Problem, candidate: Candidate, times: Times, temp: int | None
) -> dict[str, Any]:
  return {
    "method": candidate.method,
    "implementation": candidate.implementation,
    **problem.shape._asdict(),
    **({} if candidate.slices is None else {"slices": candidate.slices}),
    "milliseconds": times.median,
    "quartiles": list(times.quartiles),
    "repeats": times.repeats,
    "temp_bytes": temp,
  }


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows of one shape, relative to the fastest softmax among them.

  A training step is relative to the fastest `softmax_step`. Without that there is no
  ratio.
  """
  done = []
  for row in rows:
    base = "softmax_step" if row["method"].endswith("_step") else "softmax"
    rivals = [other["milliseconds"] for other in rows if other["method"] == base]
    ratio = {"ratio_to_softmax": row["milliseconds"] / min(rivals)} if rivals else {}
    done.append({**row, **ratio})
  return done
