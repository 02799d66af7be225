"""Measuring operators on the held-out activations of a teacher's layers."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from asap_jax.compiler.candidates import CUTS
from asap_jax.compiler.clock import operator_milliseconds
from asap_jax.compiler.fidelity import FidelitySums, fidelity_sums
from asap_jax.compiler.operators import Operator, Sinkhorn
from asap_jax.compiler.recorded import Recorded
from asap_jax.compiler.report import Alternative


class Measured(NamedTuple):
  """An operator on one layer.

  Attributes:
    label: as in `asap_jax.compiler.Alternative`.
    operator: what was measured.
    sums: fidelity on all held-out batches.
    milliseconds: of one call, on the first of them.
  """

  label: str
  operator: Operator
  sums: FidelitySums
  milliseconds: float

  @property
  def tv(self) -> float:
    """Mean over heads of the total variation to the teacher's rows."""
    return float(np.mean(self.sums.tv / self.sums.rows))

  @property
  def alternative(self) -> Alternative:
    """As reports show it."""
    return Alternative(self.label, self.tv, self.milliseconds)


def cuts(teacher: Sinkhorn) -> list[Operator]:
  """A teacher stopped earlier, and not stopped but in its fastest form."""
  kept = [k for k in CUTS if k < teacher.iterations]
  return [
    dataclasses.replace(teacher, iterations=k, implementation=None)
    for k in (*kept, teacher.iterations)
  ]


def measure(
  teacher: Recorded, operators: Sequence[Sequence[Operator]]
) -> list[list[Measured]]:
  """Each layer's operators, with the teacher as trained in front, on held-out batches.

  Raises:
    ValueError: if no batch is held out.
  """
  layers = teacher.layers
  everyone = [
    [layer.site.teacher, *of_layer]
    for layer, of_layer in zip(layers, operators, strict=True)
  ]
  sums: list[dict[int, FidelitySums]] = [{} for _ in layers]
  times: list[list[float]] = [[] for _ in layers]
  for calls in teacher.activations("Measuring", held_out=True):
    for index, (layer, of_layer) in enumerate(zip(layers, calls, strict=True)):
      for activation in of_layer:
        found = fidelity_sums(activation, everyone[index], layer.site.teacher)
        for place, new in enumerate(found):
          old = sums[index].get(place)
          sums[index][place] = new if old is None else old + new
      if not times[index]:
        times[index] = operator_milliseconds(teacher.timed[index], everyone[index])
  if not sums[0]:
    raise ValueError(
      "batches holds a single batch: expected at least two, one of them to measure on"
    )
  return [
    [
      Measured("teacher" if place == 0 else operator.label, operator, summed, taken)
      for place, (operator, summed, taken) in enumerate(zip(*of_layer, strict=True))
    ]
    for of_layer in zip(everyone, map(dict.values, sums), times, strict=True)
  ]
