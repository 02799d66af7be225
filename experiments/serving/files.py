"""Models as files, and what those who serve them make of the files."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

import asap_jax
from experiments.common.onnx_runtime import onnx_function
from experiments.common.timing import Times, time_interleaved

# As served: what a batch is made of, an array of each.
Inputs = tuple[np.ndarray, ...]


class Served(NamedTuple):
  """A model in both forms.

  Attributes:
    in_onnx: its outputs by ONNX Runtime.
    in_jax: its outputs by JAX, from StableHLO.
    sizes: of the files in bytes, `onnx_bytes` and `stablehlo_bytes`.
  """

  in_onnx: Callable[..., np.ndarray]
  in_jax: Callable[..., jax.Array]
  sizes: dict[str, int]


def serve(
  model: nnx.Module, inputs: Inputs, path: pathlib.Path, threads: int
) -> Served:
  """Writes both files beside each other, of batches of any size, and loads them."""
  names = {"onnx": path.with_suffix(".onnx"), "stablehlo": path.with_suffix(".bin")}
  asap_jax.export_onnx(model, inputs, names["onnx"])
  asap_jax.export(model, inputs, names["stablehlo"], platforms=("cpu",))
  exported = jax.export.deserialize(bytearray(names["stablehlo"].read_bytes()))
  sizes = {f"{name}_bytes": file.stat().st_size for name, file in names.items()}
  in_onnx = onnx_function(names["onnx"], threads)
  return Served(in_onnx, jax.jit(exported.call), sizes)


def measured(
  models: dict[str, nnx.Module],
  test: Inputs,
  labels: np.ndarray,
  out: pathlib.Path,
  teacher: str,
  *,
  batch: int,
  threads: int,
  repeats: int,
) -> list[dict[str, Any]]:
  """A row for each model, times in turn; `faster` is the teacher's over its own."""
  served = {}
  for name, model in models.items():
    example = tuple(each[:batch] for each in test)
    served[name] = serve(model, example, out / name.replace("@", "_"), threads)
  first = tuple(each[:batch] for each in test)
  calls: dict[tuple[str, str], Callable[[], Any]] = {}
  for name, each in served.items():
    calls[name, "onnx"] = lambda each=each: each.in_onnx(*first)  # type: ignore[misc]
    calls[name, "jax"] = lambda each=each: each.in_jax(*first)  # type: ignore[misc]
  times = time_interleaved(calls, repeats)
  return [
    {
      "method": name,
      **_agreement(model, served[name], test, labels, batch),
      **served[name].sizes,
      **_times("milliseconds", times[name, "onnx"]),
      **_times("jax_milliseconds", times[name, "jax"]),
      "faster": times[teacher, "onnx"].median / times[name, "onnx"].median,
    }
    for name, model in models.items()
  ]


def _times(name: str, times: Times) -> dict[str, Any]:
  return {name: times.median, f"{name}_quartiles": list(times.quartiles)}


def _agreement(
  model: nnx.Module, served: Served, test: Inputs, labels: np.ndarray, batch: int
) -> dict[str, float]:
  """Accuracy of the model and of its files, and how far their logits are apart."""
  own, runs = _forward(model), {"onnx": served.in_onnx, "jax": served.in_jax}
  starts: Sequence[int] = range(0, len(labels), batch)
  parts = [tuple(each[start : start + batch] for each in test) for start in starts]
  logits = np.concatenate([np.asarray(own(*part)) for part in parts])
  found = {"accuracy": float((logits.argmax(-1) == labels).mean())}
  for name, run in runs.items():
    other = np.concatenate([np.asarray(run(*part)) for part in parts])
    found[f"{name}_accuracy"] = float((other.argmax(-1) == labels).mean())
    found[f"{name}_difference"] = float(np.abs(other - logits).max())
  return found


def _forward(model: nnx.Module) -> Callable[..., jax.Array]:
  graph, state = nnx.split(model)
  return jax.jit(lambda *inputs: nnx.merge(graph, state)(*inputs))
