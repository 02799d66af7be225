"""Starts of Sinkhorn's iterations: closeness, cost, and models trained with them.

python -m experiments.starts --out DIR [--parts replaced cost reach trained]
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from flax import nnx

from experiments.common.arguments import add_seed, file, parser_for, seed_list, whole
from experiments.common.digits import Split, digits
from experiments.common.frozen_teachers import load_inputs, load_teacher
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import FEWEST_REPEATS, Laps
from experiments.common.train import train_encoders
from experiments.starts import cost, reach, replaced, trained

PARTS = ("replaced", "cost", "reach", "trained")
_FIGURES = {"replaced": replaced.draw, "reach": reach.draw}


def main(arguments: Sequence[str] | None = None) -> None:
  args = parse(arguments)
  laps = Laps()
  rows: list[dict[str, Any]] = []
  files = []
  for part in args.parts:
    found = run(part, args)
    rows += found
    laps.end(part)
    # After every part: a later one that fails takes no earlier row with it.
    path = write_results(args.out, "starts", options_of(args), rows, laps.seconds)
    if part in _FIGURES:
      files.append(args.out / f"{part}.png")
      _FIGURES[part](found, files[-1])
  print_end(laps.seconds, path, *files)


def run(part: str, args: argparse.Namespace) -> list[dict[str, Any]]:
  """Measures and prints one part."""
  if part == "replaced":
    teacher, test = teacher_of(args)
    rows, about = replaced.measure(teacher, test, args.compared)
    print_rows(replaced.displayed(rows), f"In the teacher's place; {about}")
  elif part == "cost":
    rows = cost.measure(cost.SHAPES, args.repeats, args.seed)
    print_rows(cost.displayed(rows), "The start alone")
  elif part == "reach":
    teacher, test = teacher_of(args)
    rows = reach.measure(teacher, test.inputs, args.lengths, args.repeats)
    print_rows(reach.displayed(rows), "Time to a column error")
  else:
    rows = trained.train(args.seeds, args.steps)
    print_rows(trained.displayed(rows), "Digits, trained from scratch")
  return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """Options of the command."""
  parser = parser_for(__doc__)
  add_seed(parser)
  add = parser.add_argument
  add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  add("--teacher", type=file, help="weights; without, one is trained on digits")
  add("--inputs", type=file, help="of the teacher")
  add("--heads", type=whole(1), help="of the teacher")
  add("--test-limit", type=whole(1), help="first so many test inputs")
  add("--compared", type=whole(1), default=512, help="inputs to compare plans on")
  add("--lengths", type=whole(2), nargs="+", default=list(reach.LENGTHS))
  add("--repeats", type=whole(FEWEST_REPEATS), default=15)
  add("--seeds", type=seed_list, default=[0, 1, 2], help="of training, as 0,1,2")
  add("--steps", type=whole(1), default=1500, help="training steps")
  args = parser.parse_args(arguments)
  given = [x is not None for x in (args.teacher, args.inputs, args.heads)]
  if any(given) and not all(given):
    parser.error("--teacher, --inputs and --heads go together")
  return args


def teacher_of(args: argparse.Namespace) -> tuple[nnx.Module, Split]:
  """The teacher, from files or trained here, and its test set."""
  if args.teacher is None:
    data = digits(args.seed)
    return _teacher_of_digits(args.seed, args.steps), _first(data.test, args.test_limit)
  inputs = load_inputs(args.inputs, args.test_limit)
  return load_teacher(args.teacher, args.heads), Split(inputs.test, inputs.labels)


@functools.cache
def _teacher_of_digits(seed: int, steps: int) -> nnx.Module:
  name, split = "sinkhorn", digits(seed).train
  return train_encoders([name], split, trained.MODEL, seed, steps, needed=[name])[name]


def _first(split: Split, count: int | None) -> Split:
  """The first so many examples of a split, or all."""
  return Split(split.inputs[:count], split.labels[:count])


if __name__ == "__main__":
  main()
