"""Potentials that need no iteration: exact on the line, entropic between Gaussians.

`kantorovich` solves transport on the line by one sort a side and does so along many
directions at once (`directions`), in a form for CPUs (`on_cpu`, `sorting`) and one for
all other devices (`on_accelerators`, `carrying`); `summed` adds the potentials of
paired bases up to a dual of the whole problem, with nothing learned. `gaussian` has the
entropic potential between Gaussians in closed form, without a sort.
"""

from asap_jax.potentials.gaussian import gaussian_potential
from asap_jax.potentials.kantorovich import (
  Potentials,
  kantorovich_potentials,
  sliced_potentials,
)
from asap_jax.potentials.summed import PairedBases, paired_bases, sliced_start

__all__ = [
  "PairedBases",
  "Potentials",
  "gaussian_potential",
  "kantorovich_potentials",
  "paired_bases",
  "sliced_potentials",
  "sliced_start",
]
