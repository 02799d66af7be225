"""Train a small Sinkhorn Transformer on digits, compile it, and count gain and loss.

python -m experiments.quickstart --out DIR [--seed N] [--attention NAME ...]
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

import asap_jax
from asap_jax.compiler.report import TEACHER, Report
from asap_jax.plotting import plot_plans
from experiments.common import replacements
from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.attentions import TRAINABLE, build, trainable
from experiments.common.digits import Split, batches_of, digits
from experiments.common.models import EncoderConfig
from experiments.common.recipes import about_compiling, plain_recipe
from experiments.common.results import print_end, print_rows, write_results
from experiments.common.timing import Laps
from experiments.common.train import accuracy, predict, train_encoders

CUTS, ITERATIONS, SLICES, REFINE_STEPS = (1, 2, 3, 5), 20, 8, 500
MODEL = EncoderConfig(length=64, token_size=1, classes=10)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add_seed(parser)
  parser.add_argument("--steps", type=whole(1), default=1500, help="training steps")
  parser.add_argument(
    "--attention",
    type=trainable,
    nargs="+",
    default=[],
    metavar="NAME",
    help=f"trains these too: {', '.join(TRAINABLE)}, sinkhorn@k",
  )
  args = parser.parse_args(arguments)
  run(args.out, args.seed, args.steps, attentions=args.attention)


def run(
  out: pathlib.Path,
  seed: int,
  steps: int,
  refine_steps: int = REFINE_STEPS,
  attentions: Sequence[str] = (),
) -> list[dict]:
  """The whole experiment; returns the rows that it writes to `out/results.json`.

  `attentions` are trained beside softmax and the teacher, and have a row each; those
  that end with a loss that is not finite have none.
  """
  laps, data = Laps(), digits(seed)
  needed = ("softmax", "sinkhorn")
  names = [name for name in dict.fromkeys(attentions) if name not in needed]
  trained = train_encoders(
    [*needed, *names], data.train, MODEL, seed, steps, needed=needed
  )
  teacher = replacements.by_ott(trained["sinkhorn"])
  laps.end("train")

  batches = batches_of(data.train.inputs, 64)
  fit = functools.partial(asap_jax.compile, teacher, batches, seed=seed)
  best, report = fit()
  print(report)
  laps.end("compile the best")
  compiled, _ = fit(asap_jax.Recipe(SLICES, refine_steps=refine_steps))
  ridge, _ = fit(plain_recipe(SLICES))
  asap_jax.save(out / "compiled", compiled)
  blank = nnx.eval_shape(lambda: build("sinkhorn", MODEL, 0))
  restored = asap_jax.load(out / "compiled", blank)
  laps.end("compile the others")

  identical = all(
    np.array_equal(predict(restored, batch), predict(compiled, batch))
    for batch in batches_of(data.test.inputs, 120)
  )
  if not identical:
    raise RuntimeError("the restored model's outputs differ from the compiled model's")
  own = {
    # Not the teacher stopped after as many iterations.
    f"{name}, trained" if "@" in name else name: model
    for name, model in trained.items()
    if name != "sinkhorn"
  }
  models = {
    **own,
    "softmax_swap": replacements.softmax_swap(teacher),
    "sinkhorn": teacher,
    # All of the teacher's iterations in their fastest exact form, then fewer of them.
    **{
      f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k)
      for k in (ITERATIONS, *CUTS)
    },
    "ridge": ridge,
    "asap": restored,
    "best": best,
  }
  rows = _measure(models, data.test, tuple(own))
  by_method = {row["method"]: row for row in rows}
  by_method["asap"]["restored_identical"] = identical
  by_method["best"] |= about_compiling(None, report)
  figure = out / "plans.png"
  draw_plans(teacher, restored, data.test.inputs[:120], figure)
  laps.end("evaluate")

  config = {
    "seed": seed,
    "steps": steps,
    "iterations": ITERATIONS,
    "slices": SLICES,
    "attentions": names,
  }
  path = write_results(out, "quickstart", config, rows, laps.seconds)
  print_rows(rows, f"digits, {len(data.test.labels)} test images")
  print("Restored model: outputs identical.")
  print_end(laps.seconds, path, figure)
  print(conclusion(report, by_method))
  return rows


def conclusion(report: Report, rows: Mapping[str, Mapping[str, Any]]) -> str:
  """One sentence on what the best operators gain, from the rows by their method.

  Where all layers keep the exact iterations, it says so. The rows' times are of whole
  models, taken in turn; those of the report are of its layers, and not all in turn.
  """
  best = rows["best"]
  trained = rows["sinkhorn"]["milliseconds"] / best["milliseconds"]
  exact = rows[f"sinkhorn@{ITERATIONS}"]["milliseconds"] / best["milliseconds"]
  if all(
    layer.chosen in (TEACHER, f"sinkhorn@{layer.iterations}") for layer in report.layers
  ):
    return (
      "The exact iterations stay, for nothing faster comes within TV "
      f"{report.target_tv} of them here: the model is {trained:.1f} times as fast as "
      "with OTT-JAX's by their fastest form alone."
    )
  return (
    f"With the best operators the model is {trained:.1f} times as fast as with "
    f"OTT-JAX's iterations and {exact:.2f} times as fast as in its fastest exact form, "
    f"at TV {best['tv']:.3f} on test images."
  )


def _measure(
  models: Mapping[str, nnx.Module], test: Split, own_weights: Sequence[str]
) -> list[dict]:
  """A row for each model; plans of those with weights of their own are not compared."""
  batches = batches_of(test.inputs, 120)
  compared = {name: model for name, model in models.items() if name not in own_weights}
  fidelity = replacements.plan_fidelity(models["sinkhorn"], compared, batches)
  runs = {name: replacements.forward(model) for name, model in models.items()}
  times = replacements.milliseconds_of(runs, batches[0])
  return [
    {
      "method": name,
      "accuracy": accuracy(model, test),
      **fidelity.get(name, {}),
      **({"slices": SLICES} if name in ("ridge", "asap") else {}),
      "milliseconds": times[name],
      "n_test": len(test.labels),
    }
    for name, model in models.items()
  ]


def draw_plans(
  teacher: nnx.Module, compiled: nnx.Module, inputs: np.ndarray, path: pathlib.Path
) -> None:
  """Plans of teacher, compiled layer and one Sinkhorn iteration, with column sums.

  Shown is the head, of all layers, whose plan one iteration misses most, on the input
  where it does so.
  """
  models = {
    f"Sinkhorn, {ITERATIONS} iterations\n(teacher)": teacher,
    "compiled: no iteration\n(ASAP)": compiled,
    "Sinkhorn cut to\n1 iteration": replacements.cut_sinkhorn(teacher, 1),
  }
  most = -np.inf
  worst: dict[str, np.ndarray] = {}
  for layer in replacements.layers_of(teacher, models, inputs):
    plans = layer.plans()
    exact, _, cut = plans.values()
    distance = np.abs(cut - exact).sum((-2, -1))
    where = np.unravel_index(distance.argmax(), distance.shape)
    if distance[where] > most:
      most = distance[where]
      worst = {name: plan[where] for name, plan in plans.items()}
  plot_plans(worst)[0, 0].figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
