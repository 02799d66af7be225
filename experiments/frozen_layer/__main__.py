"""Replace every attention of a frozen Sinkhorn teacher, without retraining.

python -m experiments.frozen_layer --teacher W.npz --inputs I.npz --heads H --out DIR
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

import asap_jax
from asap_jax.dual_map.features import COMPILED, KINDS
from experiments.common import replacements
from experiments.common.arguments import add_seed, file, parser_for, whole
from experiments.common.digits import Split, batches_of
from experiments.common.figures import draw_frontier, frontier_of
from experiments.common.frozen_teachers import (
  ITERATIONS,
  FrozenInputs,
  FrozenTeacher,
  load_inputs,
  load_teacher,
)
from experiments.common.recipes import about_compiling, plain_recipe
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import Laps
from experiments.common.train import accuracy
from experiments.frozen_layer.frontier import verdicts

# The last is the teacher uncut, in its fastest form like the cuts; the row `sinkhorn`
# is the same in OTT-JAX's.
CUTS, BATCH = (1, 2, 3, 5, 10, ITERATIONS), 64
# A linear map without slices and five closures: hardly more than the closures.
UNSORTED = "asap_unsorted@5"
COMPILED_ROWS = ("ridge", "asap", "asap@2", UNSORTED, "best")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  parser.add_argument("--teacher", type=file, required=True, help="weights")
  parser.add_argument("--inputs", type=file, required=True)
  parser.add_argument("--heads", type=whole(1), required=True)
  parser.add_argument("--slices", type=whole(1), default=8)
  parser.add_argument("--closures", type=whole(1), default=1, help="of the row `asap`")
  parser.add_argument("--features", nargs="+", choices=KINDS, default=COMPILED)
  parser.add_argument(
    "--refine-steps", type=whole(0), help="per layer; 0 for the ridge fit alone"
  )
  parser.add_argument(
    "--compiled", nargs="+", choices=COMPILED_ROWS, default=COMPILED_ROWS, help="rows"
  )
  parser.add_argument("--test-limit", type=whole(1), help="first so many test inputs")
  add_seed(parser)
  args = parser.parse_args(arguments)
  try:
    teacher = load_teacher(args.teacher, args.heads)
    inputs = load_inputs(args.inputs, args.test_limit)
  except ValueError as error:
    parser.error(str(error))
  run(teacher, inputs, args)


def run(teacher: FrozenTeacher, inputs: FrozenInputs, args: argparse.Namespace) -> None:
  """The whole experiment, from compiling to `args.out/results.json`."""
  laps = Laps()
  compiled, about = compile_all(teacher, batches_of(inputs.train, BATCH), args)
  laps.end("compile")
  models = {
    "sinkhorn": teacher,
    **{f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k) for k in CUTS},
    "softmax_swap": replacements.softmax_swap(teacher),
    **compiled,
  }
  test = Split(inputs.test, inputs.labels)
  tested = batches_of(inputs.test, BATCH, keep_rest=True)
  # First: after the comparison of plans, what holds kernels took up to twice as long.
  times = replacements.attention_milliseconds(teacher, models, tested[0])
  fidelity = replacements.plan_fidelity(teacher, models, tested)
  rows = [
    {
      "method": name,
      "accuracy": accuracy(model, test, BATCH),
      **fidelity[name],
      **about.get(name, {}),
      "milliseconds": times[name],
      "n_test": len(test.labels),
    }
    for name, model in models.items()
  ]
  laps.end("evaluate")
  path = write_results(args.out, "frozen_layer", options_of(args), rows, laps.seconds)
  figure = args.out / "frontier.png"
  draw_frontier(rows, figure, time="attention operators of all layers, ms")
  print_rows(rows, f"{args.teacher.stem}, {len(test.labels)} test inputs")
  for line in verdicts(frontier_of(rows)):
    print(line)
  print_end(laps.seconds, path, figure)


def compile_all(
  teacher, batches: Sequence[np.ndarray], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Compiled models by their method, and what compiling adds to their rows.

  `ridge` is the paper's plain form. `asap_unsorted@5` is a linear map without slices
  and five closures: next to nothing but the closures themselves. `best` is chosen by
  measurement.
  """
  own = asap_jax.Recipe(args.slices, features=tuple(args.features))
  if args.refine_steps is not None:
    own = dataclasses.replace(own, refine_steps=args.refine_steps)
  all_recipes: dict[str, asap_jax.Recipe | None] = {
    "ridge": plain_recipe(args.slices),
    "asap": dataclasses.replace(own, closures=args.closures),
    "asap@2": dataclasses.replace(own, closures=2),
    UNSORTED: dataclasses.replace(
      own, features=("query", "cumulants"), hidden=0, closures=5
    ),
    "best": None,
  }
  recipes = {name: all_recipes[name] for name in args.compiled}
  models: dict[str, Any] = {}
  about: dict[str, dict[str, Any]] = {}
  for name, recipe in recipes.items():
    same = [other for other in models if recipes[other] == recipe]
    if same:  # --closures 2
      models[name], about[name] = models[same[0]], about[same[0]]
      continue
    models[name], report = asap_jax.compile(teacher, batches, recipe, seed=args.seed)
    print(f"{name}:\n{report}")
    about[name] = about_compiling(recipe, report)
  return models, about


if __name__ == "__main__":
  main()
