"""Train a small Sinkhorn Transformer on digits, compile it, and count gain and loss.

python -m experiments.quickstart --out DIR [--seed N] [--attention NAME ...]
"""

import argparse
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

import asap_jax
from asap_jax.compiler.fidelity import Operator, operator_of, plan_of
from asap_jax.compiler.sites import find_sinkhorn, held_at, recorder
from asap_jax.plotting import plot_plans
from experiments.common import replacements
from experiments.common.attentions import TRAINABLE, trainable
from experiments.common.digits import Split, batches_of, digits, shift_digits
from experiments.common.models import Encoder, EncoderConfig
from experiments.common.results import new_directory, print_rows, write_results
from experiments.common.train import TrainConfig, accuracy, predict, train_classifier
from experiments.peers import __main__ as peers

ITERATIONS, CUTS, SLICES, REFINE_STEPS = 20, (1, 2, 3, 5), 8, 500
MODEL = EncoderConfig(length=64, token_size=1, classes=10)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=new_directory, required=True, help="new directory")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=1500, help="training steps")
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
  started, seconds = time.perf_counter(), {}
  data = digits(seed)
  data = data._replace(
    train=data.train._replace(inputs=data.train.inputs[..., None]),
    test=data.test._replace(inputs=data.test.inputs[..., None]),
  )
  sinkhorn = functools.partial(asap_jax.sinkhorn_attention, iterations=ITERATIONS)
  trained = {}
  for name, function in (
    ("softmax", asap_jax.softmax_attention),
    ("sinkhorn", sinkhorn),
  ):
    model = Encoder(MODEL, function, nnx.Rngs(seed))
    label = f"Training {name}"
    train_classifier(model, data.train, TrainConfig(steps), seed, label, shift_digits)
    trained[name] = model
  names = [name for name in dict.fromkeys(attentions) if name not in trained]
  others = {
    # Not the teacher stopped after as many iterations.
    f"{name}, trained" if name.startswith("sinkhorn@") else name: model
    for name, model in peers.trained(names, data.train, MODEL, seed, steps).items()
  }
  teacher = trained["sinkhorn"]
  seconds["train"] = time.perf_counter() - started

  mark = time.perf_counter()
  batches = batches_of(data.train.inputs, 64)
  compiled, report = asap_jax.compile(
    teacher, batches, SLICES, refine_steps=refine_steps, seed=seed
  )
  ridge, _ = asap_jax.compile(
    teacher,
    batches,
    SLICES,
    directions="gaussian",
    features=("potentials",),
    refine=False,
    seed=seed,
  )
  print(report)
  asap_jax.save(out / "compiled", compiled)
  blank = nnx.eval_shape(lambda: Encoder(MODEL, sinkhorn, nnx.Rngs(0)))
  restored = asap_jax.load(out / "compiled", blank)
  seconds["compile"] = time.perf_counter() - mark

  mark = time.perf_counter()
  identical = all(
    np.array_equal(predict(restored, batch), predict(compiled, batch))
    for batch in batches_of(data.test.inputs, 120)
  )
  if not identical:
    raise RuntimeError("the restored model's outputs differ from the compiled model's")
  models = {
    **trained,
    **others,
    "softmax_swap": replacements.softmax_swap(teacher),
    **{f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k) for k in CUTS},
    "ridge": ridge,
    "asap": restored,
  }
  measured = _measure(models, data.test, own_weights=("softmax", *others))
  measured["asap"]["restored_identical"] = identical
  draw_plans(teacher, restored, data.test.inputs[:120], out / "plans.png")
  seconds["evaluate"] = time.perf_counter() - mark
  seconds["total"] = time.perf_counter() - started

  cuts = [f"sinkhorn@{k}" for k in CUTS]
  order = ("softmax", *others, "softmax_swap", "sinkhorn", *cuts, "ridge", "asap")
  rows = replacements.ordered(measured, order)
  config = {
    "seed": seed,
    "steps": steps,
    "iterations": ITERATIONS,
    "slices": SLICES,
    "attentions": names,
  }
  path = write_results(out, "quickstart", config, rows, seconds)
  print_rows(rows, f"digits, {len(data.test.labels)} test images")
  print(f"Restored model: outputs identical. Wrote {path} and {out / 'plans.png'}")
  print("Seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
  return rows


def _measure(
  models: Mapping[str, nnx.Module], test: Split, own_weights: Sequence[str]
) -> dict[str, dict]:
  call = lambda model, batch: model(batch)  # noqa: E731
  batches = batches_of(test.inputs, 120)
  compared = {name: model for name, model in models.items() if name not in own_weights}
  fidelity = replacements.plan_fidelity(models["sinkhorn"], compared, batches, call)
  times = replacements.forward_milliseconds(models, batches[0], call)
  return {
    name: {
      "accuracy": accuracy(model, test),
      **fidelity.get(name, {}),
      **({"slices": SLICES} if name in ("ridge", "asap") else {}),
      "milliseconds": times[name],
      "n_test": len(test.labels),
    }
    for name, model in models.items()
  }


def draw_plans(
  teacher: nnx.Module, compiled: nnx.Module, inputs: np.ndarray, path: pathlib.Path
) -> None:
  """Plans of teacher, compiled layer and one Sinkhorn iteration, with column sums.

  Shown is the head, of all layers, whose plan one iteration misses most, on the input
  where it does so.
  """
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, lambda model, batch: model(batch))
  most = -np.inf
  worst: dict[str, np.ndarray] = {}
  for site, (activation,) in zip(sites, record(inputs), strict=True):
    operators = {
      f"Sinkhorn, {site.iterations} iterations\n(teacher)": Operator(
        "sinkhorn", site.iterations
      ),
      "compiled: no iteration\n(ASAP)": operator_of(held_at(compiled, site)),
      "Sinkhorn cut to\n1 iteration": Operator("sinkhorn", 1),
    }
    plans = [np.asarray(plan_of(activation, op)) for op in operators.values()]
    distance = np.abs(plans[2] - plans[0]).sum((-2, -1))
    where = np.unravel_index(distance.argmax(), distance.shape)
    if not worst or distance[where] > most:
      shown = (np.asarray(plan[where]) for plan in plans)
      most, worst = distance[where], dict(zip(operators, shown, strict=True))
  plot_plans(worst)[0, 0].figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
