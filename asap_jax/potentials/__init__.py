"""Exact one-dimensional Kantorovich potentials, and what is made of them unlearned.

`kantorovich` solves transport on the line by one sort a side (`sorting`) and does so
along many directions at once (`directions`); `summed` adds the potentials of paired
bases up to a dual of the whole problem, with nothing learned.
"""

from asap_jax.potentials.kantorovich import (
  Potentials,
  kantorovich_potentials,
  sliced_potentials,
)
from asap_jax.potentials.summed import PairedBases, paired_bases, sliced_start

__all__ = [
  "PairedBases",
  "Potentials",
  "kantorovich_potentials",
  "paired_bases",
  "sliced_potentials",
  "sliced_start",
]
