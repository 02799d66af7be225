"""Shapes that `experiments.speed` measures, and the methods that it tries on each."""

import argparse
from typing import NamedTuple

from experiments.speed.methods import METHODS, PEERS
from experiments.speed.problem import Shape

DTYPES = ("float32", "bfloat16", "float16")
SLICES = (8, 2, 4)
# Left out at a preset's brief shapes, as are all slice counts but the first.
FULL_ONLY = (
  "asap_linear",
  "softmax_step",
  "sinkhorn_step",
  "sinkhorn@2_step",
  "gaussian_diagonal@2_step",
  "gaussian@2_step",
)


class Preset(NamedTuple):
  """Shapes `(batch, heads, length)`, their dtype, and what may be tried on them.

  Attributes:
    dtype: of queries, keys and values.
    full: shapes for all methods.
    brief: shapes that show how time and memory grow, for fewer.
    tokens: in a batch of `--lengths`, if the lengths are not above it.
    dense_gib: methods that would hold more in matrices of all pairs are skipped.
  """

  dtype: str
  full: tuple[tuple[int, int, int], ...]
  brief: tuple[tuple[int, int, int], ...]
  tokens: int
  dense_gib: float


PRESETS = {
  "cpu": Preset(
    "float32",
    ((8, 8, 128), (1, 8, 1024)),
    ((16, 8, 64), (4, 8, 256), (1, 8, 4096)),
    tokens=1024,
    dense_gib=4.0,
  ),
  "gpu": Preset(
    "bfloat16",
    ((64, 8, 197), (8, 8, 1024)),
    ((2, 8, 4096), (1, 8, 16384), (1, 4, 65536)),
    tokens=8192,
    dense_gib=12.0,
  ),
}


class Plan(NamedTuple):
  """Methods and numbers of slices that are tried on one shape."""

  shape: Shape
  methods: tuple[str, ...]
  slices: tuple[int, ...]


def plans_of(args: argparse.Namespace) -> list[Plan]:
  """Shapes, shortest first, and the plan of each."""
  preset = PRESETS[args.preset]
  full, brief = preset.full, preset.brief
  if args.lengths:
    full = tuple(
      (max(1, preset.tokens // n), 8, n) for n in dict.fromkeys(args.lengths)
    )
    brief = ()
  plans = []
  for batch, heads, length in sorted((*full, *brief), key=lambda shape: shape[-1]):
    short = (batch, heads, length) in brief
    left_out = (*PEERS, *(FULL_ONLY if short else ()))
    methods = tuple(name for name in METHODS if name not in left_out)
    shape = Shape(
      args.batch or batch,
      args.heads or heads,
      length,
      args.head_dim,
      args.dtype or preset.dtype,
    )
    methods = tuple(dict.fromkeys(args.methods or methods))
    slices = tuple(dict.fromkeys(args.slices or (SLICES[:1] if short else SLICES)))
    shapes = [shape, shape._replace(padded=True)] if args.padded else [shape]
    plans += [Plan(each, methods, slices) for each in shapes]
  return plans
