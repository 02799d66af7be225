"""Replace every attention of a frozen Sinkhorn teacher, without retraining.

python -m experiments.frozen_layer --teacher W.npz --inputs I.npz --heads H --out DIR
"""

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import asap_jax
from asap_jax import plotting
from asap_jax.compiler import Alternative
from asap_jax.compiler.fidelity import operator_milliseconds, operator_of
from asap_jax.compiler.sites import find_sinkhorn, held_at, recorder
from asap_jax.dual_map.features import KINDS
from experiments.common import replacements
from experiments.common.digits import Split, batches_of
from experiments.common.results import new_directory, print_rows, write_results
from experiments.common.train import accuracy
from experiments.frozen_layer.frontier import verdict
from experiments.frozen_layer.teachers import ITERATIONS, load_inputs, load_teacher

# The last is the teacher uncut, in the scaling domain like the cuts; the row `sinkhorn`
# is the teacher as it was trained, in the log domain.
CUTS, BATCH = (1, 2, 3, 5, 10, ITERATIONS), 64
# A linear map without slices and five closures: hardly more than the closures.
UNSORTED = "asap_unsorted@5"


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--teacher", type=pathlib.Path, required=True, help="weights")
  parser.add_argument("--inputs", type=pathlib.Path, required=True)
  parser.add_argument("--heads", type=int, required=True)
  parser.add_argument("--out", type=new_directory, required=True, help="new directory")
  parser.add_argument("--slices", type=int, default=8)
  parser.add_argument("--closures", type=int, default=1, help="of the row `asap`")
  parser.add_argument("--features", nargs="+", choices=KINDS, default=KINDS)
  parser.add_argument(
    "--refine-steps", type=int, help="per layer; 0 for the ridge fit alone"
  )
  parser.add_argument("--test-limit", type=int, help="first so many test inputs")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(arguments)

  started, seconds = time.perf_counter(), {}
  teacher = load_teacher(args.teacher, args.heads)
  inputs = load_inputs(args.inputs, args.test_limit)
  compiled, about = compile_all(teacher, batches_of(inputs.train, BATCH), args)
  seconds["compile"] = time.perf_counter() - started

  mark = time.perf_counter()
  models = {
    "sinkhorn": teacher,
    **{f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k) for k in CUTS},
    "softmax_swap": replacements.softmax_swap(teacher),
    **compiled,
  }
  test = Split(inputs.test, inputs.labels)
  tested = batches_of(inputs.test, BATCH, keep_rest=True)
  fidelity = replacements.plan_fidelity(
    teacher, models, tested, lambda model, batch: model(batch)
  )
  times = attention_milliseconds(teacher, models, tested[0])
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
  seconds["evaluate"] = time.perf_counter() - mark
  seconds["total"] = time.perf_counter() - started
  config = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in vars(args).items()
  }
  path = write_results(args.out, "frozen_layer", config, rows, seconds)
  draw_frontier(rows, args.out / "frontier.png")
  print_rows(rows, f"{args.teacher.stem}, {len(test.labels)} test inputs")
  for line in verdicts(rows):
    print(line)
  print(f"Wrote {path} and {args.out / 'frontier.png'}")


def compile_all(
  teacher, batches: Sequence[np.ndarray], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
  """Compiled models by their method, and what their rows say of compiling.

  `ridge` is the paper's plain form: random slices, potentials alone, no refinement.
  `asap_unsorted@5` is a linear map without slices and five closures: next to nothing
  but the closures themselves.
  """
  own = {"features": tuple(args.features), **refinement(args.refine_steps)}
  options = {
    "ridge": {
      "directions": "gaussian",
      "features": ("potentials",),
      "refine": False,
      "closures": 1,
    },
    "asap": {**own, "closures": args.closures},
    "asap@2": {**own, "closures": 2},
    UNSORTED: {
      **own,
      "features": ("query", "cumulants"),
      "hidden": 0,
      "closures": 5,
    },
  }
  models: dict[str, Any] = {}
  about: dict[str, dict[str, Any]] = {}
  for name, of_method in options.items():
    same = [other for other in models if options[other] == of_method]
    if same:  # --closures 2
      models[name], about[name] = models[same[0]], about[same[0]]
      continue
    models[name], report = asap_jax.compile(
      teacher, batches, args.slices, seed=args.seed, **of_method
    )
    print(f"{name}:\n{report}")
    about[name] = {
      "slices": 0 if name == UNSORTED else args.slices,
      "closures": of_method["closures"],
      "compile_seconds": report.seconds,
    }
  return models, about


def refinement(steps: int | None) -> dict[str, Any]:
  """Options of `asap_jax.compile` for `--refine-steps`; `None` is its default."""
  if steps is None:
    return {"refine": True}
  return {"refine": True, "refine_steps": steps} if steps else {"refine": False}


def attention_milliseconds(teacher, models, batch) -> dict[str, float]:
  """Median times of the attention operators alone, summed over the layers."""
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, lambda model, batch: model(batch))
  totals = np.zeros(len(models))
  for site, (activation, *_) in zip(sites, record(batch), strict=True):
    operators = [operator_of(held_at(model, site)) for model in models.values()]
    totals += operator_milliseconds(activation, operators)
  return dict(zip(models, map(float, totals), strict=True))


def points_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[Alternative]]:
  """Points of the frontier, by family; the teacher ends the curve of the cuts."""
  points = [Alternative(row["method"], row["tv"], row["milliseconds"]) for row in rows]
  (teacher,) = (point for point in points if point.label == "sinkhorn")
  cuts = [point for point in points if point.cut is not None]
  return {
    plotting.CUTS_FAMILY: [*cuts, Alternative("teacher", 0.0, teacher.milliseconds)],
    "softmax in its place": [p for p in points if p.label == "softmax_swap"],
    "ridge, random slices": [p for p in points if p.label == "ridge"],
    "compiled": [p for p in points if p.label.startswith("asap")],
  }


def draw_frontier(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """TV to the teacher's plan against the time of the attention operators."""
  axes = plotting.plot_frontier(points_of(rows))
  axes.set_xlabel("attention operators of all layers, ms")
  figure = axes.get_figure()
  assert isinstance(figure, Figure)
  figure.savefig(path, dpi=150)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
  """A sentence per compiled method: below the curve of cut Sinkhorn or not."""
  families = points_of(rows)
  *cuts, teacher = families[plotting.CUTS_FAMILY]
  return [verdict(point, cuts, teacher) for point in families["compiled"]]


if __name__ == "__main__":
  main()
