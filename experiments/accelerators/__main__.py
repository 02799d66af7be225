"""Memory, code and operations of attentions on accelerators that are not there.

python -m experiments.accelerators --out DIR [--devices h100 v5e ...]

XLA compiles for them on any machine. Nothing is run: no number here is a time of
running, and `compile_seconds` is that of this machine.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from jax.sharding import AxisType, PartitionSpec

from experiments.accelerators.compiling import (
  AXES,
  DEVICES,
  collectives,
  compiled,
  facts,
  mesh_of,
  missing,
  placed,
  stay_on_the_cpu,
)
from experiments.accelerators.methods import (
  METHODS,
  TPUS,
  Options,
  Shape,
  case_of,
  is_kernel,
  tokens,
)
from experiments.common.arguments import parser_for, whole
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
)
from experiments.common.timing import Laps

MESH = (2, 2)
_PLAIN = [method for method in METHODS if not is_kernel(method)]


def main(arguments: Sequence[str] | None = None) -> None:
  args = parse(arguments)
  for device in args.devices:
    if needed := missing(device):
      raise SystemExit(f"Nothing here compiles for {device}: {needed}")
  laps = Laps()
  options = Options(args.dtype, args.slices, args.iterations)
  rows: list[dict[str, Any]] = []
  for device in args.devices:
    for shape in map(shape_of, args.shapes):
      for method in args.methods:
        row = row_of(device, shape, method, options)
        rows.append(row)
        print(device, *shape, method, row.get("failed", ""), flush=True)
        # A later one that fails takes no earlier row with it.
        path = write_results(
          args.out, "accelerators", options_of(args), rows, laps.seconds
        )
    laps.end(device)
  path = write_results(args.out, "accelerators", options_of(args), rows, laps.seconds)
  print_rows(rows, "compiled, not run: nothing here is a time of running")
  print_end(laps.seconds, path)


def row_of(device: str, shape: Shape, method: str, options: Options) -> dict[str, Any]:
  """What is known of a method on one device, and on a mesh that divides its shape."""
  row = {
    "method": method, "device": device, **shape._asdict(), "dtype": options.dtype
  }  # fmt: skip
  if is_kernel(method) and device not in TPUS:
    return row | {"failed": "a kernel for TPUs, which would be interpreted"}
  try:
    program, seconds = compiled(*_call(device, (1, 1), shape, method, options))
    row |= {"compile_seconds": round(seconds, 1), **facts(program)}
    if all(size % parts == 0 for size, parts in zip(shape, MESH, strict=False)):
      program, _ = compiled(*_call(device, MESH, shape, method, options))
      found = collectives(program)
      row |= {"collectives": sum(found.values()), "collective_kinds": found}
  # XLA refuses what does not fit into the device's memory, for one.
  except Exception as error:
    row["failed"] = reason_of(error)
  return row


def _call(device, parts, shape, method, options):
  # JAX does not divide kernels of our own, but where types say what devices have.
  kind = AxisType.Explicit if is_kernel(method) else AxisType.Auto
  mesh = mesh_of(device, parts, kind)
  case = case_of(method, shape, options)
  data, heads = AXES
  each = placed(mesh, tokens(shape, options), PartitionSpec(data, None, heads))
  parameters = placed(mesh, case.parameters, PartitionSpec(heads))
  return case.function, each, each, each, *parameters


def reason_of(error: Exception) -> str:
  """The first line of what is said, short enough for a table."""
  line = next(iter(str(error).splitlines()), "")
  return f"{type(error).__name__}: {line}"[:200]


def shape_of(text: str) -> Shape:
  """Type of an argument: four sizes, as 8,8,1024,64."""
  try:
    return Shape(*map(whole(1), text.split(",")))
  except (argparse.ArgumentTypeError, TypeError) as error:
    raise argparse.ArgumentTypeError(
      f"{text!r}: expected batch, heads, length and head dimension, as 8,8,1024,64"
    ) from error


def _checked_shape(text: str) -> str:
  shape_of(text)
  return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = parser_for(__doc__)
  add = parser.add_argument
  add("--devices", nargs="+", choices=DEVICES, default=["h100", "v5e"])
  add(
    "--shapes",
    nargs="+",
    type=_checked_shape,
    default=["8,8,1024,64"],
    help="batch, heads, length and head dimension",
  )
  add("--methods", nargs="+", choices=METHODS, default=_PLAIN)
  add("--dtype", choices=("float32", "bfloat16"), default="float32")
  add("--slices", type=whole(1), default=8, help="of asap and potentials")
  add("--iterations", type=whole(1), default=20, help="of sinkhorn")
  return parser.parse_args(arguments)


if __name__ == "__main__":
  stay_on_the_cpu()
  main()
