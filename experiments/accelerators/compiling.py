"""Programs for an accelerator that is not there, and what is known of them.

XLA compiles for a described device as well as for one at hand. `h100.txtpb` describes
an H100 in XLA's own format; libtpu knows all TPUs by name.
"""

import importlib.util
import math
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Modules that know a device; and how a host of four is called.
_GPU, _TPU = "jax_plugins.xla_cuda12", "libtpu"
DEVICES = {
  "h100": (_GPU, "1x1x{}"),
  "v5e": (_TPU, "v5e:2x2"),
  "v6e": (_TPU, "v6e:2x2"),
  "v5p": (_TPU, "v5p:2x2x1"),
}
AXES = ("data", "heads")
COUNTED = ("gather", "scatter", "sort", "while", "conditional", "custom-call")
COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
)  # fmt: skip
# Of a device's own calls and of results' places in memory no size is known.
_SIZES = {"pred": 1, "bf16": 2} | {
  f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (.*?) ([a-z][a-z0-9-]*)\(", re.M)
_LOOP = re.compile(r" while\(.*condition=%?([^\s,]+)(.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([^\s(]+) .*\{\n((?:.*\n)*?)\}", re.M)


def stay_on_the_cpu() -> None:
  """Keeps JAX from looking for accelerators; to be called before it has a device."""
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def missing(device: str) -> str | None:
  """What has to be installed to compile for a device, or `None`."""
  module, _ = DEVICES[device]
  try:
    found = importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    found = False
  return None if found else 'pip install -e ".[experiments,accelerators]"'


def mesh_of(
  device: str, shape: tuple[int, int] = (1, 1), kind: AxisType = AxisType.Auto
) -> Mesh:
  """Devices to compile for, at most four of them, by the axes `data` and `heads`."""
  size = math.prod(shape)
  _, name = DEVICES[device]
  options: dict[str, Any] = {"platform": "tpu", "topology_name": name}
  if device == "h100":
    described = pathlib.Path(__file__).with_name("h100.txtpb").read_text()
    options = {
      "platform": "cuda",
      "topology_name": device,
      "target_config": described,
      "topology": name.format(size),
    }
  devices = topologies.get_topology_desc(**options).devices
  return Mesh(np.array(devices[:size]).reshape(shape), AXES, axis_types=(kind,) * 2)


def placed(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
  """Shapes of a tree's arrays as arguments that are spread over a mesh."""
  sharding = NamedSharding(mesh, spec)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
  """A compiled function of placed shapes, and the seconds that it took."""
  start = time.perf_counter()
  found = jax.jit(function).lower(*arguments).compile()
  return found, time.perf_counter() - start


def facts(program: Any) -> dict[str, int]:
  """Bytes and operations of a compiled function; an operation in a loop counts once.

  `while_on_data` are loops whose condition compares no counter: it is what the device
  computes, and on a GPU the host waits for it.
  """
  text, memory = program.as_text(), program.memory_analysis()
  count = Counter(name for _, name in _INSTRUCTION.findall(text))
  bodies = dict(_COMPUTATION.findall(text))
  return {
    "temp_bytes": int(memory.temp_size_in_bytes),
    "code_bytes": int(memory.generated_code_size_in_bytes),
    "largest_array_bytes": max(map(_bytes, _written(text)), default=0),
    **{name.replace("-", "_"): count[name] for name in COUNTED},
    "while_on_data": sum(
      " compare(" not in bodies.get(condition, "") and "known_trip_count" not in rest
      for condition, rest in _LOOP.findall(text)
    ),
  }


def collectives(program: Any) -> dict[str, int]:
  """Kinds of communication between devices, and how many there are of each."""
  found = _INSTRUCTION.findall(program.as_text())
  count = Counter(name.removesuffix("-start") for _, name in found)
  return {name: count[name] for name in COLLECTIVES if count[name]}


def _written(text: str) -> Iterator[str]:
  """Types of what instructions write to memory: nothing inside of a fusion."""
  inside = set(re.findall(r" fusion\(.*calls=%?([^\s,]+)", text))
  for name, body in _COMPUTATION.findall(text):
    if name not in inside:
      yield from (kind for kind, _ in _INSTRUCTION.findall(body))


def _bytes(kind: str) -> int:
  """Of the largest array of a type, which may be a tuple."""
  return max(
    (
      _SIZES.get(dtype, 0) * math.prod(map(int, filter(None, shape.split(","))))
      for dtype, shape in re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", kind)
    ),
    default=0,
  )
