"""Time and memory of attentions and of their parts, against the length.

python -m experiments.speed --out DIR [--preset cpu|gpu] [--lengths N ...]
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax

from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import FEWEST_REPEATS, Laps
from experiments.speed.display import displayed, draw
from experiments.speed.measuring import measure
from experiments.speed.methods import METHODS
from experiments.speed.plans import DTYPES, PRESETS, plans_of
from experiments.speed.problem import make_problem


def main(arguments: Sequence[str] | None = None) -> None:
  args = parse(arguments)
  laps = Laps()
  rows: list[dict[str, Any]] = []
  skipped: list[str] = []
  config = {**options_of(args), "skipped": skipped}
  for plan in plans_of(args):
    print(f"{plan.shape} ...", flush=True)
    problem = make_problem(plan.shape, plan.slices, args.iterations, args.seed)
    measured, reasons = measure(
      problem, plan.methods, args.repeats, args.dense_gib, laps
    )
    for reason in reasons:
      print(f"  {reason}")
    skipped += reasons
    rows += measured
    # After every shape: a later one that fails takes no earlier row with it.
    path = write_results(args.out, "speed", config, rows, laps.seconds)
  if not rows:
    raise SystemExit("Nothing could be timed: see the reasons above.")
  device = jax.devices()[0].device_kind
  print_rows(displayed(rows), f"{device}, {rows[0]['dtype']}")
  print_end(laps.seconds, path, *draw(rows, args.out / "scaling.png"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """Options of the command; `dense_gib` is the preset's if it is not given."""
  parser = parser_for(__doc__)
  add_seed(parser)
  add = parser.add_argument
  preset = "gpu" if jax.default_backend() == "gpu" else "cpu"
  add("--preset", choices=PRESETS, default=preset, help="shapes, dtype and methods")
  add(
    "--lengths",
    type=whole(2),
    nargs="+",
    help="instead of the preset's shapes, for all methods",
  )
  add("--batch", type=whole(1), help="for all lengths; else their tokens are constant")
  add("--heads", type=whole(1), help="for all lengths; 8 by default")
  add("--head-dim", type=whole(1), default=64)
  add("--dtype", choices=DTYPES, help="the preset's by default")
  add("--padded", action="store_true", help="each shape also as a padded batch")
  add("--methods", nargs="+", choices=METHODS, help="at all lengths; peers only so")
  add("--slices", type=whole(1), nargs="+", help="of asap; its parts take the first")
  add("--iterations", type=whole(1), default=20, help="of the teacher")
  add("--repeats", type=whole(FEWEST_REPEATS), default=15)
  add("--dense-gib", type=float, help="most that n x m matrices may take")
  args = parser.parse_args(arguments)
  if args.dense_gib is None:
    args.dense_gib = PRESETS[args.preset].dense_gib
  return args


if __name__ == "__main__":
  main()
