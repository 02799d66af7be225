"""A layer compiled at one length and used at others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import ArrayLike

import asap_jax
from experiments.common import replacements

HEADS, WIDTH, KINDS, COMPILED_AT = 4, 64, 12, 64
BATCHES, TOKENS = 10, 2048  # a batch


def length_rows(lengths: Sequence[int], seed: int) -> list[dict[str, Any]]:
  """TV to the teacher and alarms, by length; tokens are drawn alike at all lengths."""
  rng = np.random.default_rng(seed)
  kinds = rng.normal(size=(KINDS, WIDTH))
  teacher = asap_jax.SinkhornMultiHeadAttention(
    HEADS,
    WIDTH,
    kernel_init=nnx.initializers.normal(2.0 / WIDTH**0.5),
    rngs=nnx.Rngs(seed),
  )

  def batches(length: int) -> list[np.ndarray]:
    shape = BATCHES, max(TOKENS // length, 2), length
    tokens = kinds[rng.integers(KINDS, size=shape)]
    return list((tokens + 0.5 * rng.normal(size=tokens.shape)).astype(np.float32))

  own = batches(COMPILED_AT)
  options: dict[str, Any] = {"seed": seed, "monitor": True, "progress": False}
  recipe = asap_jax.Recipe(8)
  watched = asap_jax.compile(teacher, own, recipe, **options).model
  bare, _ = asap_jax.compiler.unwatched(watched)
  rows = []
  for length in lengths:
    found = batches(length)
    fidelity = replacements.plan_fidelity(teacher, {"asap": bare}, found)["asap"]
    readings = [_look(watched, batch) for batch in found]
    rows.append(
      {
        "kind": "length",
        "method": "asap",
        "length": length,
        "batch_size": len(found[0]),
        **fidelity,
        "alarms": float(np.mean([bool(each.alarm.any()) for each in readings])),
        "shown": float(np.mean([each.column_error.mean() for each in readings])),
        "threshold": float(np.mean([each.threshold.mean() for each in readings])),
      }
    )
  return rows


@nnx.jit
def _look(model: nnx.Module, batch: ArrayLike):
  (reading,) = asap_jax.watch(model, batch)[1].values()
  return reading
