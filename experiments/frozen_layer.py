"""Replace every attention of a frozen Sinkhorn teacher, without retraining.

python -m experiments.frozen_layer --teacher W.npz --inputs I.npz --heads H --out DIR
"""

import argparse
import pathlib
import time

import matplotlib.pyplot as plt
import numpy as np

import asap_jax
from asap_jax.dual_map import FEATURES, KINDS
from asap_jax.fidelity import operator_milliseconds, operator_of
from asap_jax.surgery import find_sinkhorn, held_at, recorder
from experiments import replacements
from experiments.data import Split, batches_of
from experiments.frozen import load_inputs, load_teacher
from experiments.results import print_rows, write_results
from experiments.train import accuracy

CUTS, BATCH = (1, 2, 3, 5, 10), 64


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--teacher", type=pathlib.Path, required=True, help="weights")
  parser.add_argument("--inputs", type=pathlib.Path, required=True)
  parser.add_argument("--heads", type=int, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--slices", type=int, default=8)
  parser.add_argument("--features", nargs="+", choices=KINDS, default=FEATURES)
  parser.add_argument("--refine-steps", type=int, default=600, help="per layer")
  parser.add_argument("--test-limit", type=int, help="first so many test inputs")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(arguments)

  started, seconds = time.perf_counter(), {}
  teacher = load_teacher(args.teacher, args.heads)
  inputs = load_inputs(args.inputs, args.test_limit)
  batches = batches_of(inputs.train, BATCH)

  compiled, report = asap_jax.compile(
    teacher,
    batches,
    args.slices,
    features=tuple(args.features),
    refine_steps=args.refine_steps,
    seed=args.seed,
  )
  seconds["compile"] = time.perf_counter() - started
  print(report)
  ridge, _ = asap_jax.compile(
    teacher,
    batches,
    args.slices,
    directions="gaussian",
    features=("potentials",),
    seed=args.seed,
  )
  mark = time.perf_counter()
  models = {
    "sinkhorn": teacher,
    **{f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k) for k in CUTS},
    "softmax_swap": replacements.softmax_swap(teacher),
    "ridge": ridge,
    "asap": compiled,
  }
  test = Split(inputs.test, inputs.labels)
  tested = batches_of(inputs.test, min(BATCH, len(inputs.test)))
  fidelity = replacements.plan_fidelity(
    teacher, models, tested, lambda model, batch: model(batch)
  )
  times = attention_milliseconds(teacher, models, tested[0])
  rows = [
    {
      "method": name,
      "accuracy": accuracy(model, test, BATCH),
      **fidelity[name],
      **({"slices": args.slices} if name in ("ridge", "asap") else {}),
      "milliseconds": times[name],
      "n_test": len(test.labels),
    }
    for name, model in models.items()
  ]
  seconds["evaluate"] = time.perf_counter() - mark
  seconds["total"] = time.perf_counter() - started
  config = {name: str(v) if name in _PATHS else v for name, v in vars(args).items()}
  path = write_results(args.out, "frozen_layer", config, rows, seconds)
  draw_frontier(rows, args.out / "frontier.png")
  print_rows(rows, f"{args.teacher.stem}, {len(test.labels)} test inputs")
  print(f"Wrote {path} and {args.out / 'frontier.png'}")


_PATHS = ("teacher", "inputs", "out")


def attention_milliseconds(teacher, models, batch) -> dict[str, float]:
  """Median times of the attention operators alone, summed over the layers."""
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, lambda model, batch: model(batch))
  totals = np.zeros(len(models))
  for site, (activation, *_) in zip(sites, record(batch), strict=True):
    operators = [operator_of(held_at(model, site)) for model in models.values()]
    totals += operator_milliseconds(activation, operators)
  return dict(zip(models, map(float, totals), strict=True))


def draw_frontier(rows, path: pathlib.Path) -> None:
  """TV to the teacher's plan against the time of the attention operators."""
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  cuts = [row for row in rows if row["method"].startswith("sinkhorn@")]
  axes.plot(
    [row["milliseconds"] for row in cuts],
    [row["tv"] for row in cuts],
    color="#555555",
    marker="o",
    label="Sinkhorn cut short",
  )
  for name, marker, colour in (
    ("softmax_swap", "s", "#e69f00"),
    ("ridge", "^", "#56b4e9"),
    ("asap", "*", "#0072b2"),
  ):
    (row,) = (row for row in rows if row["method"] == name)
    axes.plot(
      row["milliseconds"], row["tv"], marker, color=colour, markersize=10, label=name
    )
  for row in cuts:
    axes.annotate(
      row["method"].removeprefix("sinkhorn"),
      (row["milliseconds"], row["tv"]),
      textcoords="offset points",
      xytext=(6, 4),
    )
  axes.set(
    xlabel="attention operators of all layers, ms",
    ylabel="total variation to the teacher",
    xlim=(0, None),
    ylim=(0, None),
  )
  axes.legend()
  figure.savefig(path, dpi=150)
  plt.close(figure)


if __name__ == "__main__":
  main()
