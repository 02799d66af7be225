"""Export a teacher and its compiled forms, and time the files in ONNX Runtime and JAX.

python -m experiments.serving --out DIR [--seed N] [--threads N]
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

import asap_jax
from asap_jax.compiler.sites import Replacement, find_sinkhorn, replace_sites
from experiments.common import replacements
from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.digits import Dataset, batches_of, digits
from experiments.common.models import EncoderConfig
from experiments.common.padding import ragged
from experiments.common.results import print_end, print_rows, write_results
from experiments.common.timing import Laps
from experiments.common.train import train_encoders
from experiments.serving.files import measured
from experiments.serving.scaling import scaling_attention

ITERATIONS, SLICES, REFINE_STEPS = 20, 8, 500
BATCH, CALIBRATION = 120, 64
TEACHER = f"sinkhorn@{ITERATIONS}"
MODEL = EncoderConfig(length=64, token_size=1, classes=10)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add_seed(parser)
  parser.add_argument("--steps", type=whole(1), default=1500, help="training steps")
  parser.add_argument("--threads", type=whole(1), default=2, help="of ONNX Runtime")
  parser.add_argument("--repeats", type=whole(3), default=21, help="of every call")
  args = parser.parse_args(arguments)
  run(args.out, args.seed, args.steps, args.threads, args.repeats)


def run(
  out: pathlib.Path,
  seed: int,
  steps: int,
  threads: int,
  repeats: int,
  refine_steps: int = REFINE_STEPS,
) -> list[dict]:
  """The whole experiment; returns the rows that it writes to `out/results.json`."""
  laps, data = Laps(), digits(seed)
  trained = train_encoders(["sinkhorn"], data.train, MODEL, seed, steps)
  teacher = trained["sinkhorn"]
  laps.end("train")
  rows = []
  for name, inputs in (("digits", _whole), ("padded digits", _padded)):
    models = _models(teacher, inputs, data, seed, refine_steps)
    laps.end("compile")
    found = measured(
      models,
      inputs(data.test.inputs),
      data.test.labels,
      out / name.replace(" ", "_"),
      TEACHER,
      batch=BATCH,
      threads=threads,
      repeats=repeats,
    )
    rows += [{"model": name, **row} for row in found]
    laps.end("measure")
  config = {"seed": seed, "steps": steps, "threads": threads, "repeats": repeats}
  path = write_results(out, "serving", config, rows, laps.seconds)
  print_rows(rows, f"batches of {BATCH} images, {threads} threads")
  print_end(laps.seconds, path)
  return rows


def _whole(images: np.ndarray) -> tuple[np.ndarray, ...]:
  return (images,)


def _padded(images: np.ndarray) -> tuple[np.ndarray, ...]:
  """Images that keep a quarter to all of their first pixels, as texts of a batch do."""
  valid = np.asarray(ragged(len(images), images.shape[1]))
  order = np.random.default_rng(0).permutation(len(images))
  return images, valid[order]


def _models(
  teacher: nnx.Module, inputs: Any, data: Dataset, seed: int, refine_steps: int
) -> dict[str, nnx.Module]:
  parts = [batches_of(each, CALIBRATION) for each in inputs(data.train.inputs)]
  batches = list(zip(*parts, strict=True))
  compile = functools.partial(
    asap_jax.compile,
    teacher,
    batches,
    seed=seed,
    call=lambda model, batch: model(*batch),
  )
  best, report = compile()
  print(report)
  sliced, _ = compile(asap_jax.Recipe(SLICES, refine_steps=refine_steps))
  sites = find_sinkhorn(teacher)
  scaling = [
    Replacement(scaling_attention, iterations=site.iterations, **site.options)
    for site in sites
  ]
  return {
    TEACHER: teacher,
    f"scaling@{ITERATIONS}": replace_sites(teacher, sites, scaling),
    "best": best,
    "asap": sliced,
    "softmax_swap": replacements.softmax_swap(teacher),
  }


if __name__ == "__main__":
  main()
