"""Time and memory of attentions and of their parts, against the length.

python -m experiments.speed --out DIR [--preset cpu|gpu] [--lengths N ...]
"""

import argparse
import concurrent.futures
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from experiments.common.results import new_directory, print_rows, write_results
from experiments.common.timing import FEWEST_REPEATS, time_interleaved
from experiments.speed.display import displayed, draw
from experiments.speed.methods import METHODS, PEERS, Candidate, candidates
from experiments.speed.problem import Problem, Shape, make_problem

DTYPES = ("float32", "bfloat16", "float16")
SLICES = (8, 2, 4)
# Left out at a preset's brief shapes, as are all slice counts but the first.
FULL_ONLY = ("asap_linear", "softmax_step", "sinkhorn_step")
GIB = 2**30


class Preset(NamedTuple):
  """Shapes `(batch, heads, length)`, their dtype, and what may be tried on them.

  Attributes:
    dtype: of queries, keys and values.
    full: shapes for all methods.
    brief: shapes that show how time and memory grow, for fewer.
    tokens: in a batch of `--lengths`, if the lengths are not above it.
    dense_gib: methods that would hold more in matrices of all pairs are skipped.
  """

  dtype: str
  full: tuple[tuple[int, int, int], ...]
  brief: tuple[tuple[int, int, int], ...]
  tokens: int
  dense_gib: float


PRESETS = {
  "cpu": Preset(
    "float32",
    ((8, 8, 128), (1, 8, 1024)),
    ((16, 8, 64), (4, 8, 256), (1, 8, 4096)),
    tokens=1024,
    dense_gib=4.0,
  ),
  "gpu": Preset(
    "bfloat16",
    ((64, 8, 197), (8, 8, 1024)),
    ((2, 8, 4096), (1, 8, 16384), (1, 4, 65536)),
    tokens=8192,
    dense_gib=12.0,
  ),
}


class Plan(NamedTuple):
  """What is tried on one shape."""

  shape: Shape
  methods: tuple[str, ...]
  slices: tuple[int, ...]


def main(arguments: list[str] | None = None) -> None:
  args = _parser().parse_args(arguments)
  if args.dense_gib is None:
    args.dense_gib = PRESETS[args.preset].dense_gib
  started = time.perf_counter()
  rows: list[dict[str, Any]] = []
  skipped: list[str] = []
  config = {**vars(args), "out": str(args.out), "skipped": skipped}
  seconds = {"compile": 0.0, "evaluate": 0.0}
  for plan in plans_of(args):
    print(f"{plan.shape} ...", flush=True)
    problem = make_problem(plan.shape, plan.slices, args.iterations, args.seed)
    measured, reasons, spent = measure(problem, plan.methods, args)
    for reason in reasons:
      print(f"  {reason}")
    skipped += reasons
    rows += measured
    for name, value in spent.items():
      seconds[name] += value
    seconds["total"] = time.perf_counter() - started
    # After every shape: what is measured stays, whatever comes next.
    path = write_results(args.out, "speed", config, rows, seconds)
  if not rows:
    raise SystemExit("Nothing could be timed: see the reasons above.")
  device = jax.devices()[0].device_kind
  print_rows(displayed(rows), f"{device}, {rows[0]['dtype']}")
  written = [path, *draw(rows, args.out / "scaling.png")]
  print("Wrote", " and ".join(map(str, written)))
  print("Seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  positive = functools.partial(_at_least, 1)
  preset = "gpu" if jax.default_backend() == "gpu" else "cpu"
  add("--out", type=new_directory, required=True, help="new directory")
  add("--preset", choices=PRESETS, default=preset, help="shapes, dtype and methods")
  add(
    "--lengths",
    type=functools.partial(_at_least, 2),
    nargs="+",
    help="instead of the preset's shapes, for all methods",
  )
  add("--batch", type=positive, help="for all lengths; else their tokens are constant")
  add("--heads", type=positive, help="for all lengths; 8 by default")
  add("--head-dim", type=positive, default=64)
  add("--dtype", choices=DTYPES, help="that of the preset by default")
  add("--methods", nargs="+", choices=METHODS, help="at all lengths; peers only so")
  add("--slices", type=positive, nargs="+", help="of asap; its parts take the first")
  add("--iterations", type=positive, default=20, help="of the teacher")
  add("--repeats", type=functools.partial(_at_least, FEWEST_REPEATS), default=15)
  add("--dense-gib", type=float, help="most that n x m matrices may take")
  add("--seed", type=int, default=0)
  return parser


def _at_least(least: int, text: str) -> int:
  """Type of an argument of argparse."""
  try:
    value = int(text)
  except ValueError:
    value = least - 1
  if value < least:
    raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {least} up")
  return value


def plans_of(args: argparse.Namespace) -> list[Plan]:
  """Shapes, shortest first, and what is tried on each."""
  preset = PRESETS[args.preset]
  full, brief = preset.full, preset.brief
  if args.lengths:
    full = tuple(
      (max(1, preset.tokens // n), 8, n) for n in dict.fromkeys(args.lengths)
    )
    brief = ()
  plans = []
  for batch, heads, length in sorted((*full, *brief), key=lambda shape: shape[-1]):
    short = (batch, heads, length) in brief
    left_out = (*PEERS, *(FULL_ONLY if short else ()))
    methods = tuple(name for name in METHODS if name not in left_out)
    plans.append(
      Plan(
        Shape(
          args.batch or batch,
          args.heads or heads,
          length,
          args.head_dim,
          args.dtype or preset.dtype,
        ),
        tuple(dict.fromkeys(args.methods or methods)),
        tuple(dict.fromkeys(args.slices or (SLICES[:1] if short else SLICES))),
      )
    )
  return plans


def measure(
  problem: Problem, methods: Sequence[str], args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str], dict[str, float]]:
  """Rows of one shape, why others are missing, and the seconds it took."""
  started = time.perf_counter()
  kept = []
  left_out: dict[str, dict[str, None]] = {}
  for candidate in candidates(problem, methods):
    reason, lowered = candidate.unavailable, None
    gib = candidate.matrices * problem.shape.matrix_bytes / GIB
    if reason is None and gib > args.dense_gib:
      reason = f"n x m matrices of {gib:.1f} GiB, over --dense-gib {args.dense_gib:g}"
    if reason is None:
      try:
        function = jax.jit(candidate.function)
        lowered = function.lower(*problem.inputs, *candidate.arguments)
      # An implementation that cannot serve says so; nothing is run or allocated yet.
      except (ValueError, RuntimeError) as error:
        reason = str(error)
    if reason is None:
      kept.append((candidate, lowered))
    else:
      name = f"{candidate.method} {candidate.implementation}"
      left_out.setdefault(reason, {})[name] = None
  size = "{} x {} x {}".format(*problem.shape)
  reasons = [f"skipped at {size}: {', '.join(n)}: {why}" for why, n in left_out.items()]
  compiled = _compile([lowered for _, lowered in kept], problem.device)
  compile_seconds = time.perf_counter() - started

  calls = {
    index: functools.partial(run, *problem.inputs, *candidate.arguments)
    for index, ((candidate, _), run) in enumerate(zip(kept, compiled, strict=True))
  }
  queued = problem.device != "cpu"
  times = time_interleaved(calls, args.repeats, args.seed, queued=queued)
  rows = [
    _row(problem, candidate, times[index], _temp_bytes(compiled[index]))
    for index, (candidate, _) in enumerate(kept)
  ]
  seconds = {
    "compile": compile_seconds,
    "evaluate": time.perf_counter() - started - compile_seconds,
  }
  return with_ratios(rows), reasons, seconds


def _compile(lowered: Sequence[Any], device: str) -> list[Callable[..., Any]]:
  # Elsewhere compiling times kernels to choose among them: one at a time.
  workers = os.cpu_count() if device == "cpu" else 1
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return list(pool.map(lambda each: each.compile(), lowered))


def _temp_bytes(compiled: Any) -> int | None:
  """Bytes that XLA allocates besides arguments and results, if it says."""
  analysis = compiled.memory_analysis()
  return None if analysis is None else int(analysis.temp_size_in_bytes)


def _row(problem: Problem, candidate: Candidate, times, temp_bytes) -> dict[str, Any]:
  return {
    "method": candidate.method,
    "implementation": candidate.implementation,
    **problem.shape._asdict(),
    **({} if candidate.slices is None else {"slices": candidate.slices}),
    "milliseconds": times.median,
    "quartiles": list(times.quartiles),
    "repeats": times.repeats,
    "temp_bytes": temp_bytes,
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


if __name__ == "__main__":
  main()
