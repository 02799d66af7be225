"""Where to start Sinkhorn's algorithm: sliced potentials against OTT-JAX's starts.

python -m experiments.initializers --out DIR
"""

import argparse
import functools
from collections.abc import Sequence

import numpy as np

from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import Laps
from experiments.initializers.clouds import FAMILIES, MOST_POINTS, Clouds, Family
from experiments.initializers.solving import solved
from experiments.initializers.starts import BATCH, learned_starts, plain_starts


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add_seed(parser)
  add = parser.add_argument
  add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
  add("--points", type=whole(2, MOST_POINTS), default=128, help="of each cloud")
  add("--tests", type=whole(1), default=16, help="fresh problems")
  add("--fitted", type=whole(2 * BATCH), default=160, help="problems to learn from")
  add("--steps", type=whole(0), default=200, help="0 for no learned maps")
  add("--tolerances", type=float, nargs="+", default=[1e-3, 1e-5], help="of a marginal")
  args = parser.parse_args(arguments)
  laps, rows = Laps(), []
  for name in args.families:
    for epsilon in FAMILIES[name].epsilons:
      found = measure(FAMILIES[name], epsilon, args)
      for tolerance in args.tolerances:
        shown = [row for row in found if row["tolerance"] == tolerance]
        title = f"{name}, epsilon {epsilon:g}, to {tolerance:g}"
        print_rows(displayed(shown), title)
      rows += [{**row, "family": name} for row in found]
  path = write_results(args.out, "initializers", options_of(args), rows, laps.seconds)
  print_end(laps.seconds, path)


def measure(family: Family, epsilon: float, args: argparse.Namespace) -> list[dict]:
  """A row per start and tolerance: iterations and time on fresh problems.

  `of_default` is the mean over problems of the ratio to the iterations from zero.
  """
  draw = functools.partial(family.problems, points=args.points, seed=args.seed)
  fitted, tested = draw(args.fitted, test=False), draw(args.tests, test=True)
  scale = mean_cost(fitted) if family.cost == "squared" else 1.0
  starts = plain_starts(fitted.x.shape[-1], args.seed)
  if args.steps and not family.weighted:
    starts |= learned_starts(
      fitted, family.cost, epsilon * scale, args.steps, args.seed
    )
  rows = []
  for tolerance in args.tolerances:
    reference = None
    for name, start in starts.items():
      each, row = solved(tested, start, epsilon * scale, family.cost, tolerance)
      reference = each if reference is None else reference
      row["of_default"] = float(np.mean(each / reference))
      rows.append({"method": name, "epsilon": epsilon, "tolerance": tolerance, **row})
  return rows


def displayed(rows: list[dict]) -> list[dict]:
  """Rows as they are printed; the first error is of the marginal, in all its mass."""
  return [
    {
      "start": row["method"],
      "iterations": f"{row['iterations']:.1f}",
      "of default": f"{row['of_default']:.2f}",
      "converged": f"{row['converged']:.0%}",
      "first error": f"{row['first_error']:.3f}",
      "rate": f"{row['rate']:.3f}",
      "start ms": f"{row['start_ms']:.2f}",
      "all ms": f"{row['milliseconds']:.2f}",
    }
    for row in rows
  ]


def mean_cost(clouds: Clouds) -> float:
  """Of |x - y|^2, over all pairs of the first problems."""
  pairs = clouds.x[:8, :, None] - clouds.y[:8, None]
  return float(np.mean(np.sum(pairs**2, -1)))


if __name__ == "__main__":
  main()
