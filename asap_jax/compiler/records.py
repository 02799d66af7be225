"""What compiling knew of each place, kept in the model so that saving can write it.

A record is a dictionary that JSON takes, held as text: static, and equal by value.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from flax import nnx

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.report import LayerReport
from asap_jax.compiler.sites import Place, Replacement, find_held

COMPILED = AsapAttention, CandidateAttention, Replacement
_FIGURES = ("r2", "tv", "kl", "column_error", "teacher_column_error")


def keep_record(function: Any, record: Mapping[str, Any]) -> None:
  """Leaves a record with an attention function that compiling put in a place.

  It replaces what was there: `record_of(function) | {"more": ...}` adds to it.

  Args:
    function: an `AsapAttention`, `CandidateAttention` or `Replacement`.
    record: what JSON takes; saved and loaded as it is.
  """
  function.record = json.dumps(record, sort_keys=True)


def record_of(function: Any) -> dict[str, Any]:
  """The record of an attention function, empty if it has none.

  Args:
    function: what stands in a place of a model.

  Returns:
    What `keep_record` left.

  >>> from asap_jax.compiler.sites import Replacement
  >>> function = Replacement(max)
  >>> keep_record(function, {"device": "cpu"})
  >>> record_of(function)
  {'device': 'cpu'}
  """
  text = getattr(function, "record", None)
  return {} if text is None else json.loads(text)


def records_of(model: nnx.Module) -> dict[str, dict[str, Any]]:
  """What was known when a model was compiled, of every place, by its name.

  Args:
    model: compiled, or loaded.

  Returns:
    For each place: the `teacher`, whose iterations were replaced; the `device` that it
    was chosen on; `calibration`, the sequences fitted and held out; `target_tv`; and of
    each of its `layers` what was chosen, and its fidelity per head as in
    `asap_jax.compiler.LayerReport`. Empty for what was not made by `asap_jax.compile`.

  Example:
    >>> records_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    {}
  """
  return {
    dotted(place): record_of(held) for place, held in compiled_places(model).items()
  }


def compiled_places(model: nnx.Module) -> dict[Place, Any]:
  """Everything that compiling put into a model, by place; no map inside another."""
  held: dict[Place, Any] = {}
  for kind in COMPILED:
    held |= find_held(model, kind)
  inside = {(*p, a) for (p, a), h in held.items() if isinstance(h, CandidateAttention)}
  return {
    (path, attribute): each
    for (path, attribute), each in held.items()
    if not any(path[: len(above)] == above for above in inside)
  }


def dotted(place: Place) -> str:
  """A place in one word, as reports have it but for Flax's `attention_fn`."""
  path, attribute = place
  return ".".join(map(str, (*path, attribute)))


def record_for(
  teacher: Sinkhorn,
  layers: Sequence[LayerReport],
  device: str,
  target_tv: float | None,
  sequences: Mapping[str, int],
) -> dict[str, Any]:
  """The record of one place.

  Args:
    teacher: that stood there.
    layers: reports of the layers there, several if a scan runs them.
    device: kind of the device that was measured on.
    target_tv: that was chosen by, or `None`.
    sequences: `"fitted"` and `"held_out"`, how many.
  """
  return {
    "teacher": asdict(teacher),
    "device": device,
    "target_tv": target_tv,
    "calibration": dict(sequences),
    "layers": [
      {"name": layer.name, "chosen": layer.chosen}
      | {name: _plain(getattr(layer, name)) for name in _FIGURES}
      for layer in layers
    ],
  }


def _plain(figures: np.ndarray) -> list[float | None]:
  """Of each head; `None` where there is none, for JSON has no NaN."""
  return [float(x) if np.isfinite(x) else None for x in np.asarray(figures)]
