"""Fidelity against time: is an operator better than Sinkhorn that is cut short?"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from asap_jax.compiler import Alternative
from asap_jax.plotting import CUTS_FAMILY


def tv_of_cuts(
  milliseconds: float, cuts: Sequence[Alternative], teacher: Alternative
) -> float:
  """TV that cut Sinkhorn reaches in a given time.

  Linear between the measured cuts, in the order of their times; between the last of
  them and the teacher, whose TV is zero, as well. A cut that is slower than another and
  farther from the teacher does not count: one would take the other. Infinite below the
  fastest cut.

  Raises:
    ValueError: if there is no cut.
  """
  if not cuts:
    raise ValueError("cuts is empty: expected at least one")
  points = sorted((point.milliseconds, point.tv) for point in (*cuts, teacher))
  times, distances = np.transpose(points)
  lowest = np.minimum.accumulate(distances)
  return float(np.interp(milliseconds, times, lowest, left=math.inf))


def verdict(
  point: Alternative, cuts: Sequence[Alternative], teacher: Alternative
) -> str:
  """One sentence: whether a point lies below the curve of cut Sinkhorn."""
  rival = tv_of_cuts(point.milliseconds, cuts, teacher)
  found = f"{point.label}: TV {point.tv:.4f} in {point.milliseconds:.2f} ms"
  if math.isinf(rival):
    return f"{found} is faster than every cut of Sinkhorn that was measured."
  side = "below" if point.tv < rival else "NOT below"
  return f"{found} is {side} cut Sinkhorn's curve, {rival:.4f} at equal time."


def verdicts(families: Mapping[str, Sequence[Alternative]]) -> list[str]:
  """A sentence for each compiled method of a frontier."""
  *cuts, teacher = families[CUTS_FAMILY]
  return [verdict(point, cuts, teacher) for point in families.get("compiled", ())]
