"""Attentions trained from scratch on digits, with one budget: gain, cost and plans.

python -m experiments.peers --out DIR [--attentions NAME ...] [--seeds 0,1,2]
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.arguments import parser_for, seed_list, whole
from experiments.common.attentions import trainable
from experiments.common.digits import Split, batches_of, digits
from experiments.common.measuring import cost_of, measure
from experiments.common.models import EncoderConfig
from experiments.common.results import (
  pooled_row,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import Laps
from experiments.common.train import train_encoders
from experiments.peers.claims import judge
from experiments.peers.display import displayed, draw

MODEL = EncoderConfig(length=64, token_size=1, classes=10)
ITERATIONS, REFINE_STEPS = 20, 500
# Made of the trained model `sinkhorn`, without training.
DERIVED = ("sinkhorn_scaling", "asap")
ATTENTIONS = (
  "softmax",
  "sinkhorn",
  "sinkhorn_scaling",
  "sinkhorn@3",
  "kernel_sinkhorn",
  "sinkformer",
  "esp",
  "lot",
  "differential",
  "swgg",
  "est",
  "qr",
  "cayley",
  "asap",
)
# Trained where they are named: a step takes many times that of the others.
SLOW = ("qontot",)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  parser.add_argument(
    "--attentions",
    type=_name,
    nargs="+",
    default=ATTENTIONS,
    help=f"{', '.join((*ATTENTIONS, *SLOW))}, sinkhorn@k",
  )
  parser.add_argument("--seeds", type=seed_list, default=[0, 1, 2], help="as 0,1,2")
  parser.add_argument("--steps", type=whole(1), default=600, help="training steps")
  parser.add_argument("--layers", type=whole(1), default=MODEL.layers)
  args = parser.parse_args(arguments)
  lacking = [name for name in args.attentions if name in DERIVED]
  if lacking and "sinkhorn" not in args.attentions:
    parser.error(f"{', '.join(lacking)} is made of sinkhorn: name that too")
  run(args.out, args.attentions, args.seeds, args.steps, args.layers)


def _name(text: str) -> str:
  """Type of an argument: a name of `ATTENTIONS`, or `sinkhorn@k`."""
  return text if text in DERIVED else trainable(text)


def run(
  out: pathlib.Path,
  attentions: Sequence[str],
  seeds: Sequence[int],
  steps: int,
  layers: int = MODEL.layers,
  refine_steps: int = REFINE_STEPS,
) -> list[dict[str, Any]]:
  """The whole experiment; returns the rows that it writes to `out/results.json`."""
  laps = Laps()
  config = dataclasses.replace(MODEL, layers=layers)
  names = list(dict.fromkeys(attentions))
  own = [name for name in names if name not in DERIVED]
  measured: dict[str, list[dict[str, Any] | None]] = {name: [] for name in names}
  kept: dict[str, nnx.Module] = {}
  for seed in seeds:
    data = digits(seed)
    models: dict[str, nnx.Module] = dict(
      train_encoders(own, data.train, config, seed, steps)
    )
    laps.end("train")
    if "sinkhorn" in models:
      models["sinkhorn"] = replacements.by_ott(models["sinkhorn"])
    models |= derived(names, models.get("sinkhorn"), data.train, seed, refine_steps)
    laps.end("compile")
    for name in names:
      model = models.get(name)
      measured[name].append(None if model is None else measure(model, data.test))
    laps.end("evaluate")
    kept = models | kept

  if not kept:
    raise SystemExit("No model could be trained: see the reasons above.")
  print("Timing forward passes and training steps", flush=True)
  costs = cost_of(kept, data.test)
  rows = [
    {
      "method": name,
      **pooled_row(measured[name]),
      **costs[name],
      "length": config.length,
    }
    for name in names
    if name in kept
  ]
  laps.end("evaluate")
  options = {
    "attentions": names,
    "seeds": list(seeds),
    "steps": steps,
    "refine_steps": refine_steps,
    "iterations": ITERATIONS,
    **dataclasses.asdict(config),
  }
  path = write_results(out, "peers", options, rows, laps.seconds)
  draw(rows, out / "peers.png")
  print_rows(displayed(rows), f"digits, {len(data.test.labels)} test images a seed")
  verdicts = "\n".join(map(str, judge(rows)))
  (out / "claims.txt").write_text(verdicts + "\n")
  print(f"Claimed, measured, reproduced or not:\n{verdicts}")
  print_end(laps.seconds, path, out / "peers.png", out / "claims.txt")
  return rows


def derived(
  names: Sequence[str],
  teacher: nnx.Module | None,
  split: Split,
  seed: int,
  refine_steps: int,
) -> dict[str, nnx.Module]:
  """The trained Sinkhorn model in its fastest form, and compiled."""
  if teacher is None:
    return {}
  makers = {
    "sinkhorn_scaling": lambda: replacements.cut_sinkhorn(teacher, ITERATIONS),
    "asap": lambda: asap_jax.compile(
      teacher,
      batches_of(split.inputs, 64),
      asap_jax.Recipe(refine_steps=refine_steps),
      seed=seed,
    )[0],
  }
  return {name: make() for name, make in makers.items() if name in names}


if __name__ == "__main__":
  main()
