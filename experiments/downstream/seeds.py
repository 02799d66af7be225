"""One seed of the downstream experiment: train, compile, evaluate."""

import argparse
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.timing import Laps
from experiments.datasets.loaders import Batch
from experiments.datasets.tasks import Task
from experiments.downstream import evaluation
from experiments.downstream.baseline import linear_baseline
from experiments.downstream.data import (
  Data,
  ordered_batches,
  training_batches,
  whole_batches,
)
from experiments.downstream.presets import Preset, build
from experiments.downstream.training import error_of_columns, train

# Of an attention's name and a seed.
Make = Callable[[str, int], nnx.Module]
# Test inputs that plans are compared on, and forward passes that are timed.
PLANS, REPEATS = 512, 5


def run_seed(
  data: Data,
  foreign: Sequence[Batch] | None,
  preset: Preset,
  names: Sequence[str],
  args: argparse.Namespace,
  seed: int,
  directory: pathlib.Path,
  make: Make | None = None,
) -> dict[str, Any]:
  """Rows by method, rows of shifted inputs, and seconds, as JSON has them.

  `foreign` are inputs of another data set to compile on as well; `directory` keeps
  checkpoints, metrics and the compiled model; `make` as of `train_all`.
  """
  laps = Laps()
  trained, about = train_all(names, data, preset, seed, directory, make)
  if args.train_only:
    return _trained_alone(trained, about, data, laps)
  teacher = trained["sinkhorn"] = replacements.by_ott(trained["sinkhorn"])
  # In all processes that had a share in it.
  train_seconds = sum(each["train_seconds"] for each in about.values())
  laps.end("train")

  transform = data.prepared.test_transform
  replaced, of_compiling = evaluation.compiled(
    teacher,
    whole_batches(data.train, transform, preset.calibration),
    slices=args.slices,
    refine_steps=preset.refine_steps,
    seed=seed,
    names=evaluation.COMPILED if make is None else evaluation.COMPILED_PRETRAINED,
  )
  replaced = {**evaluation.without_training(teacher), **replaced}
  about |= of_compiling
  asap_jax.save(directory / "asap" / "compiled", replaced["asap"], overwrite=True)
  laps.end("compile")

  plans = whole_batches(data.prepared.test, transform, PLANS)
  found = evaluation.measure(
    trained,
    replaced,
    ordered_batches(data.prepared.test, transform),
    plans,
    repeats=REPEATS,
  )
  order = [name for name in (*replaced, *trained) if name != "sinkhorn"]
  order = ["softmax", "sinkhorn", *(n for n in order if n != "softmax")]
  rows = [{"method": name, **found[name], **about.get(name, {})} for name in order]
  shift = _shifted_rows(trained, replaced, data, plans)
  if foreign is not None:
    shift += _foreign_rows(teacher, data, foreign, plans, args, preset, seed)
  laps.end("evaluate")
  seconds = {**laps.seconds, "train": train_seconds}
  del seconds["total"]
  return {"rows": rows, "shift": shift, "seconds": seconds}


def _trained_alone(
  trained: Mapping[str, nnx.Module],
  about: Mapping[str, Mapping[str, Any]],
  data: Data,
  laps: Laps,
) -> dict[str, Any]:
  """What `run_seed` returns, of models whose attention is not replaced."""
  seconds = {"train": sum(each["train_seconds"] for each in about.values())}
  laps.end("train")
  transform = data.prepared.test_transform
  runs = {name: replacements.forward(model) for name, model in trained.items()}
  found = evaluation.accuracies(runs, ordered_batches(data.prepared.test, transform))
  count = found.pop("n_test")
  plans = whole_batches(data.prepared.test, transform, PLANS)
  rows = []
  for name, model in trained.items():
    graph, states = nnx.graphdef(model), nnx.state(model, nnx.Param, ...)
    errors = [float(error_of_columns(graph, *states, batch)) for batch in plans]
    own = {"accuracy": found[name], "column_error": float(np.mean(errors))}
    rows.append({"method": name, **own, **about[name], "n_test": count})
  laps.end("evaluate")
  seconds |= {"compile": 0.0, "evaluate": laps.seconds["evaluate"]}
  return {"rows": rows, "shift": [], "seconds": seconds}


def train_all(
  names: Sequence[str],
  data: Data,
  preset: Preset,
  seed: int,
  directory: pathlib.Path,
  make: Make | None = None,
) -> tuple[dict[str, nnx.Module], dict[str, dict[str, Any]]]:
  """Models by their attention, and what training adds to their rows.

  Peers whose loss does not stay finite are left out; the teacher must not be. `make`
  makes the untrained models, in the place of `build`.
  """
  if make is None:
    make = lambda name, seed: build(name, preset, data.prepared, seed)  # noqa: E731
  config, models, about = preset.training(), {}, {}
  for name in names:
    started = time.perf_counter()
    try:
      # A pretrained encoder is converted and distilled here.
      model = make(name, seed)
      made_seconds = time.perf_counter() - started
      result = train(
        model,
        training_batches(data, config.batch_size, seed),
        lambda: ordered_batches(data.held_out, data.prepared.test_transform),
        config,
        seed=seed,
        checks=preset.checks,
        directory=directory / name,
        label=f"{name}, seed {seed}",
      )
    except FloatingPointError as error:
      if name in ("softmax", "sinkhorn"):
        raise
      print(error)
      continue
    models[name] = result.model
    about[name] = {
      "held_out_accuracy": result.held_out_accuracy,
      "best_step": result.best_step,
      "train_seconds": made_seconds + result.seconds,
      "column_error_at_checks": result.column_errors,
    }
  return models, about


def _shifted_rows(trained, replaced, data: Data, plans) -> list[dict[str, Any]]:
  """Rows of these models on inputs of another kind; see `evaluation.shifted`."""
  kind = "half length" if data.prepared.kind == "text" else "enlarged centre"
  kept = {name: replaced[name] for name in evaluation.SHIFTED if name in replaced}
  batches = ordered_batches(data.prepared.test, data.prepared.test_transform)
  found = evaluation.measure(
    {"sinkhorn": trained["sinkhorn"]},
    kept,
    map(evaluation.shifted, batches),
    [evaluation.shifted(batch) for batch in plans],
  )
  return [{"method": name, "shift": kind, **row} for name, row in found.items()]


def _foreign_rows(
  teacher, data: Data, foreign, plans, args, preset: Preset, seed: int
) -> list[dict[str, Any]]:
  """Operators that were compiled on another data set's inputs, on this one's."""
  replaced, about = evaluation.compiled(
    teacher,
    foreign,
    slices=args.slices,
    refine_steps=preset.refine_steps,
    seed=seed,
    names=("ridge", "asap"),
  )
  test = ordered_batches(data.prepared.test, data.prepared.test_transform)
  found = evaluation.measure({"sinkhorn": teacher}, replaced, test, plans)
  kind = f"compiled on {args.shift_dataset}"
  return [
    {"method": name, "shift": kind, **found[name], **about[name]} for name in replaced
  ]


def baseline_row(task: Task) -> dict[str, Any]:
  """Logistic regression on the inputs themselves."""
  return {"method": "linear", "accuracy": linear_baseline(task)}
