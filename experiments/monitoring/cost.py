"""What watching costs: whole models with and without it, in turn."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

import asap_jax
from experiments.common.attentions import build
from experiments.common.models import EncoderConfig
from experiments.common.timing import time_interleaved

REPEATS = 31
SLICES = 8
SIZES = {64: 120, 256: 16, 1024: 2}  # of the batch, by length


def cost_rows(seed: int, sizes: dict[int, int] | None = None) -> list[dict[str, Any]]:
  """Rows of compiled encoders of several lengths that were not trained."""
  return [
    {"kind": "cost", "method": method, "length": length, "batch_size": size, **row}
    for length, size in (sizes or SIZES).items()
    for method, row in _of_length(length, size, seed).items()
  ]


def _of_length(length: int, size: int, seed: int) -> dict[str, dict[str, Any]]:
  rng = np.random.default_rng(seed)
  teacher = build("sinkhorn", EncoderConfig(length, token_size=8, classes=10), seed)
  batches = list(rng.normal(size=(3, size, length, 8)).astype(np.float32))
  options: dict[str, Any] = {"seed": seed, "monitor": True, "progress": False}
  recipe = asap_jax.Recipe(SLICES, refine_steps=0)
  watched = asap_jax.compile(teacher, batches, recipe, **options).model
  unsliced = asap_jax.Recipe(1, features=("cumulants",), refine_steps=0)
  models = {
    "asap": watched,
    "unsliced": asap_jax.compile(teacher, batches, unsliced, **options).model,
  }
  calls = {}
  for name, model in models.items():
    calls[name, "watched"] = _run(asap_jax.watch, model, batches[0])
    calls[name, "bare"] = _run(lambda model, x: model(x), model, batches[0])
  times = time_interleaved(calls, REPEATS, seed)
  return {
    name: {
      "milliseconds": times[name, "bare"].median,
      "quartiles": list(times[name, "bare"].quartiles),
      "watched_milliseconds": times[name, "watched"].median,
      "watched_quartiles": list(times[name, "watched"].quartiles),
      "ratio": times[name, "watched"].median / times[name, "bare"].median,
    }
    for name in models
  }


def _run(function, model: nnx.Module, batch):
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, batch: function(nnx.merge(graph, state), batch))
  run(state, batch)  # compiles
  return functools.partial(run, state, batch)
