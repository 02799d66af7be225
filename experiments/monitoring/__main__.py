"""Do watched models notice shifted inputs, at what price, and other lengths?

python -m experiments.monitoring --out DIR [--seeds 0,1,2] [--steps N]
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.arguments import parser_for, seed_list, whole
from experiments.common.digits import Dataset, batches_of, digits
from experiments.common.measuring import column_error_of
from experiments.common.models import EncoderConfig
from experiments.common.results import (
  options_of,
  pooled_row,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import Laps
from experiments.common.train import train_encoders
from experiments.monitoring.cost import cost_rows
from experiments.monitoring.lengths import length_rows

MODEL = EncoderConfig(length=64, token_size=1, classes=10)
SLICES, CUT, CALIBRATION_BATCH = 8, 1, 64
SIZES = (1, 8, 32)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add = parser.add_argument
  add("--seeds", type=seed_list, default=[0, 1, 2], help="as 0,1,2")
  add("--steps", type=whole(1), default=1500, help="training steps")
  add("--refine-steps", type=whole(0), default=500, help="of the map with slices")
  add(
    "--lengths",
    type=whole(2),
    nargs="+",
    default=[16, 32, 64, 128, 256, 512, 1024],
    help="that a layer compiled at 64 tokens is used at",
  )
  args = parser.parse_args(arguments)
  laps = Laps()
  per_seed = []
  for seed in args.seeds:
    data = digits(seed)
    models = watched_models(data, seed, args.steps, args.refine_steps)
    laps.end("train and compile")
    per_seed.append(list(shift_rows(models, data, np.random.default_rng(seed))))
    laps.end("shifts")
  rows = [pooled_row(rows) for rows in zip(*per_seed, strict=True)]
  rows += cost_rows(args.seeds[0])
  laps.end("cost")
  rows += length_rows(args.lengths, args.seeds[0])
  laps.end("lengths")
  path = write_results(args.out, "monitoring", options_of(args), rows, laps.seconds)
  for kind in ("shift", "cost", "length"):
    print_rows([row for row in rows if row["kind"] == kind], kind)
  print_end(laps.seconds, path)


def watched_models(
  data: Dataset, seed: int, steps: int, refine_steps: int
) -> dict[str, nnx.Module]:
  """A teacher on digits, compiled and cut short; each watched."""
  trained = train_encoders(
    ["sinkhorn"], data.train, MODEL, seed, steps, needed=("sinkhorn",)
  )
  teacher = trained["sinkhorn"]
  batches = batches_of(data.train.inputs, CALIBRATION_BATCH)
  fit = functools.partial(asap_jax.compile, teacher, batches, seed=seed, monitor=True)
  cut = replacements.cut_sinkhorn(teacher, CUT)
  # What compile holds out: every fifth batch, from the second on.
  held_out = batches[1::5]
  return {
    "best": fit().model,
    "asap": fit(asap_jax.Recipe(SLICES, refine_steps=refine_steps)).model,
    f"sinkhorn@{CUT}": asap_jax.monitor(cut, held_out),
  }


def shifted(inputs: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Test images, and what a careless user may feed instead."""
  noise = rng.normal(size=inputs.shape).astype(np.float32)
  return {
    "test": inputs,
    "inverted": 1.0 - inputs,
    "noisy": np.clip(inputs + 0.3 * noise, 0.0, 1.0),
    "darker": 0.5 * inputs,
    "shuffled": rng.permutation(inputs, axis=1),
  }


def shift_rows(models: Mapping[str, nnx.Module], data: Dataset, rng):
  """Alarms of each model on batches of every size, usual and shifted."""
  for name, model in models.items():
    bare, _ = asap_jax.compiler.unwatched(model)
    look = jitted_watch(model)
    for shift, inputs in shifted(data.test.inputs, rng).items():
      exact = column_error_of(bare, inputs[:120])
      for size in SIZES:
        found = [look(batch) for batch in batches_of(inputs, size)]
        yield {
          "kind": "shift",
          "method": name,
          "shift": shift,
          "batch_size": float(size),
          "alarms": float(np.mean([is_alarm(readings) for readings in found])),
          "heads": float(np.mean([alarms_of(readings) for readings in found])),
          "shown": float(np.mean([shown_by(readings) for readings in found])),
          "column_error": exact,
        }


def jitted_watch(model: nnx.Module):
  """Readings of a batch."""
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, x: asap_jax.watch(nnx.merge(graph, state), x)[1])
  return functools.partial(run, state)


def alarms_of(readings: Mapping[str, Any]) -> float:
  """Share of heads that give an alarm."""
  return float(np.mean([np.asarray(each.alarm) for each in readings.values()]))


def is_alarm(readings: Mapping[str, Any]) -> bool:
  """Whether any head of any layer gives an alarm."""
  return alarms_of(readings) > 0.0


def shown_by(readings: Mapping[str, Any]) -> float:
  """Mean over layers and heads of the column errors shown."""
  return float(np.mean([np.asarray(each.column_error) for each in readings.values()]))


if __name__ == "__main__":
  main()
