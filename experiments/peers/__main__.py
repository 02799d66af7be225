"""Attentions trained from scratch on digits, with one budget: gain, cost and plans.

python -m experiments.peers --out DIR [--attentions NAME ...] [--seeds 0,1,2]
"""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.attentions import build, trainable
from experiments.common.digits import Dataset, Split, batches_of, digits, shift_digits
from experiments.common.models import EncoderConfig
from experiments.common.results import (
  new_directory,
  print_rows,
  seeds_of,
  write_results,
)
from experiments.common.train import TrainConfig, train_classifier
from experiments.peers.claims import judge
from experiments.peers.display import displayed, draw
from experiments.peers.measuring import cost_of, measure, pooled

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
  "asap",
)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=new_directory, required=True, help="new directory")
  parser.add_argument(
    "--attentions",
    type=_name,
    nargs="+",
    default=ATTENTIONS,
    help=f"{', '.join(ATTENTIONS)}, sinkhorn@k",
  )
  parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="as 0,1,2")
  parser.add_argument("--steps", type=int, default=600, help="training steps")
  parser.add_argument("--layers", type=int, default=MODEL.layers)
  args = parser.parse_args(arguments)
  lacking = [name for name in args.attentions if name in DERIVED]
  if lacking and "sinkhorn" not in args.attentions:
    parser.error(f"{', '.join(lacking)} is made of sinkhorn: name that too")
  run(args.out, args.attentions, args.seeds, args.steps, args.layers)


def _name(text: str) -> str:
  """Type of an argument of argparse."""
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
  started = time.perf_counter()
  config = dataclasses.replace(MODEL, layers=layers)
  names = list(dict.fromkeys(attentions))
  seconds = dict.fromkeys(("train", "compile", "evaluate"), 0.0)
  measured: dict[str, list[dict[str, Any] | None]] = {name: [] for name in names}
  kept: dict[str, nnx.Module] = {}
  for seed in seeds:
    data = tokens_of(digits(seed))
    mark = time.perf_counter()
    models = trained(names, data.train, config, seed, steps)
    seconds["train"] += time.perf_counter() - mark
    mark = time.perf_counter()
    models |= derived(names, models.get("sinkhorn"), data.train, seed, refine_steps)
    seconds["compile"] += time.perf_counter() - mark
    mark = time.perf_counter()
    for name in names:
      model = models.get(name)
      measured[name].append(None if model is None else measure(model, data.test))
    seconds["evaluate"] += time.perf_counter() - mark
    kept = models | kept

  if not kept:
    raise SystemExit("No model could be trained: see the reasons above.")
  mark = time.perf_counter()
  print("Timing forward passes and training steps", flush=True)
  costs = cost_of(kept, data.test)
  rows = [
    {"method": name, **pooled(measured[name]), **costs[name], "length": config.length}
    for name in names
    if name in kept
  ]
  seconds["evaluate"] += time.perf_counter() - mark
  seconds["total"] = time.perf_counter() - started
  options = {
    "attentions": names,
    "seeds": list(seeds),
    "steps": steps,
    "refine_steps": refine_steps,
    "iterations": ITERATIONS,
    **dataclasses.asdict(config),
  }
  path = write_results(out, "peers", options, rows, seconds)
  draw(rows, out / "peers.png")
  print_rows(displayed(rows), f"digits, {len(data.test.labels)} test images a seed")
  verdicts = "\n".join(map(str, judge(rows)))
  (out / "claims.txt").write_text(verdicts + "\n")
  print(f"Claimed, measured, reproduced or not:\n{verdicts}")
  print(f"Wrote {path}, {out / 'peers.png'} and {out / 'claims.txt'}")
  print("Seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
  return rows


def tokens_of(data: Dataset) -> Dataset:
  """Every pixel is a token of one feature."""
  train, test = (
    part._replace(inputs=part.inputs[..., None]) for part in (data.train, data.test)
  )
  return data._replace(train=train, test=test)


def trained(
  names: Sequence[str], split: Split, config: EncoderConfig, seed: int, steps: int
) -> dict[str, nnx.Module]:
  """Models of one seed; those whose loss does not stay finite are left out."""
  models: dict[str, nnx.Module] = {}
  for name in names:
    if name in DERIVED:
      continue
    model, label = build(name, config, seed), f"{name}, seed {seed}"
    try:
      train_classifier(model, split, TrainConfig(steps), seed, label, shift_digits)
    except FloatingPointError as error:
      print(error)
    else:
      models[name] = model
  return models


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
      teacher, batches_of(split.inputs, 64), refine_steps=refine_steps, seed=seed
    )[0],
  }
  return {name: make() for name, make in makers.items() if name in names}


if __name__ == "__main__":
  main()
