"""Accuracy and fidelity of operators that replace a trained teacher's attention."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.recipes import about_compiling, plain_recipe

Batch = dict[str, np.ndarray]
CUTS = (1, 2, 3, 5)
# Of accuracy, of the teacher over softmax in its place.
LEAST_GAIN = 1e-3
# Of a large encoder each takes its time.
COMPILED_PRETRAINED = ("asap", "best")
COMPILED = ("ridge", "asap", "asap@2", "best")
# What a shift is measured on: the compiled operators, and what a user could take.
SHIFTED = ("softmax_swap", "sinkhorn@1", "sinkhorn@3", "ridge", "asap", "best")


def compiled(
  teacher: nnx.Module,
  batches: Sequence[Batch],
  *,
  slices: int,
  refine_steps: int,
  seed: int,
  names: Sequence[str],
) -> tuple[dict[str, nnx.Module], dict[str, dict[str, Any]]]:
  """Compiled models by their method, and what compiling adds to their rows.

  `ridge` is the paper's plain form, `best` what is chosen by measurement. `names` are
  of `COMPILED`. Zero `refine_steps` leave the ridge fit of `asap`, too.
  """
  own = asap_jax.Recipe(slices, refine_steps=refine_steps)
  recipes = {
    "ridge": plain_recipe(slices),
    "asap": own,
    "asap@2": dataclasses.replace(own, closures=2),
    "best": None,
  }
  models, about = {}, {}
  for name in names:
    recipe = recipes[name]
    models[name], report = asap_jax.compile(teacher, batches, recipe, seed=seed)
    about[name] = about_compiling(recipe, report)
  return models, about


def without_training(teacher: nnx.Module) -> dict[str, nnx.Module]:
  """Models by their method that need no calibration."""
  return {
    "softmax_swap": replacements.softmax_swap(teacher),
    **{f"sinkhorn@{k}": replacements.cut_sinkhorn(teacher, k) for k in CUTS},
  }


def measure(
  trained: Mapping[str, nnx.Module],
  replaced: Mapping[str, nnx.Module],
  batches: Iterable[Batch],
  fidelity_batches: Sequence[Batch],
  *,
  repeats: int = 0,
) -> dict[str, dict[str, Any]]:
  """Accuracy of all models, and fidelity of those that replace the teacher's attention.

  Args:
    trained: models of their own by method; `sinkhorn` is the teacher.
    replaced: the teacher with other attentions, by method.
    batches: all labelled inputs, of one batch size but for the last.
    fidelity_batches: unlabelled ones, to compare plans on.
    repeats: timed forward passes on the first of these; none by default.

  Returns:
    Entries of the row of each method.
  """
  teacher, models = trained["sinkhorn"], {**trained, **replaced}
  runs = {name: replacements.forward(model) for name, model in models.items()}
  found = accuracies(runs, batches)
  count = found.pop("n_test")
  rows = {name: {"accuracy": value} for name, value in found.items()}
  same = {"sinkhorn": teacher, **replaced}
  layers = replacements.layer_fidelity(teacher, same, fidelity_batches)
  for name, of_method in layers.items():
    rows[name] |= replacements.mean_over_layers(of_method) | {"layers": of_method}
  if repeats:
    times = replacements.milliseconds_of(runs, fidelity_batches[0], repeats)
    for name, milliseconds in times.items():
      rows[name]["milliseconds"] = milliseconds
  return {name: {**row, "n_test": count} for name, row in rows.items()}


def accuracies(
  runs: Mapping[str, Callable[[Any], jax.Array]], batches: Iterable[Batch]
) -> dict[str, Any]:
  """Share of right predictions of every function, and `n_test`, their number.

  A last batch that is smaller is filled up, so that nothing compiles for it.
  """
  right, count, size = dict.fromkeys(runs, 0), 0, None
  for batch in batches:
    labels = batch["label"]
    size = size or len(labels)
    inputs = inputs_of(batch)
    missing = size - len(labels)
    if missing:
      inputs = {
        name: np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
        for name, part in inputs.items()
      }
    count += len(labels)
    for name, run in runs.items():
      logits = np.asarray(run(inputs))[: len(labels)]
      right[name] += int((logits.argmax(-1) == labels).sum())
  return {name: value / count for name, value in right.items()} | {"n_test": count}


def inputs_of(batch: Batch) -> Batch:
  """A batch without its labels: what models are called with."""
  return {name: part for name, part in batch.items() if name != "label"}


def recovered(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
  """Accuracy that each replacement recovers of what the teacher gains over softmax.

  (accuracy - softmax_swap) / (teacher - softmax_swap); `None` for all where the teacher
  gains less than `LEAST_GAIN`, for the quotient means nothing then.
  """
  teacher, swap = (rows[name]["accuracy"] for name in ("sinkhorn", "softmax_swap"))
  gain = teacher - swap
  return {
    name: (row["accuracy"] - swap) / gain if gain >= LEAST_GAIN else None
    for name, row in rows.items()
    if "tv" in row and name not in ("sinkhorn", "softmax_swap")
  }


def shifted(batch: Batch) -> Batch:
  """Inputs of another kind: texts of half the length, images enlarged about the centre.

  Of images, the middle three quarters of both sides fill the whole.
  """
  if "image" not in batch:
    length = batch["valid"].shape[1]
    kept = np.arange(length) < max(1, length // 2)
    return {**batch, "valid": batch["valid"] & kept}
  images = batch["image"]
  crops = tuple(side // 8 for side in images.shape[1:3])
  middle = images[
    :, crops[0] : images.shape[1] - crops[0], crops[1] : images.shape[2] - crops[1]
  ]
  return {**batch, "image": np.asarray(_enlarged(middle, images.shape))}


@functools.partial(jax.jit, static_argnums=1)
def _enlarged(images: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.image.resize(jnp.asarray(images), shape, "bilinear")
