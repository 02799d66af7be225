"""Candidates for the place of a Sinkhorn attention, and which of them to take."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from asap_jax.dual_map.features import COMPILED, KINDS
from asap_jax.masses import Side

CUTS = (1, 2, 3, 5, 10)
STARTS = ("gaussian_diagonal", "gaussian")
MOST = 10  # closures


class Family(NamedTuple):
  """Dual maps that differ in nothing but the number of closures that follow.

  Attributes:
    name: in labels.
    features: kinds, see `asap_jax.dual_map.features`.
    expected: TV, in that of `DIAGONAL` with as many closures; what was measured on
      teachers of images and texts, to judge by what is worth fitting first.
    slices: along principal directions.
    side: whose dual is predicted; half a closure follows one of the keys.
    hidden: units of a network.
  """

  name: str
  features: tuple[str, ...]
  expected: float
  slices: int = 0
  side: Side = "query"
  hidden: int = 0

  def holds(self, other: "Family") -> bool:
    """Whether it computes all that another does, and so takes no less time."""
    return (
      self.side == other.side
      and set(self.features) >= set(other.features)
      and self.slices >= other.slices
      and self.hidden >= other.hidden
    )

  @property
  def counts(self) -> range:
    """Numbers of closures, the least first."""
    return range(1) if self.side == "key" else range(1, MOST + 1)

  def label(self, count: int) -> str:
    """Name of one of its maps."""
    return f"{self.name}@{count}"


_LINEAR = ("query", "cumulants", "gaussian_diagonal")
DIAGONAL = Family("diagonal", _LINEAR, 1.0)
FAMILIES = (
  DIAGONAL,
  Family("half, diagonal", _LINEAR, 1.7, side="key"),
  Family("cumulants", _LINEAR[:2], 1.4),
  Family("half, cumulants", _LINEAR[:2], 2.4, side="key"),
  Family("low rank", (*_LINEAR, "gaussian"), 0.85),
  Family("half, low rank", (*_LINEAR, "gaussian"), 1.4, side="key"),
  *(
    Family(f"{slices} slices", ("potentials", *_LINEAR), expected, slices)
    for slices, expected in ((1, 0.97), (2, 0.95), (4, 0.9), (8, 0.85))
  ),
  Family("network", COMPILED, 0.55, slices=8, hidden=64),
)
assert set(KINDS) >= {kind for family in FAMILIES for kind in family.features}


class Point(NamedTuple):
  """What is known of a candidate: its time, and its TV to the teacher's plans."""

  milliseconds: float
  tv: float


def choose(points: Mapping[str, Point], target_tv: float) -> str:
  """The fastest of the points within the target; of equally fast ones the closest.

  So no other point is as fast and as close, or better in one and equal in the other: it
  would be within the target too, and come first.

  Raises:
    ValueError: if none is within the target.

  Example:
    >>> points = {"fast": Point(1.0, 0.2), "close": Point(2.0, 0.01)}
    >>> choose(points, 0.05)
    'close'
  """
  within = {name: point for name, point in points.items() if point.tv <= target_tv}
  if not within:
    raise ValueError(
      f"target_tv={target_tv}: no point of {dict(points)} is within; expected the "
      "exact iterations among them"
    )
  return min(within, key=lambda name: within[name])


def predicted_tv(
  family: Family, count: int, known: Mapping[tuple[str, int], float]
) -> float:
  """TV to be expected of a map, from those that are fitted already.

  Closures bring it down by about one factor each, which two fits of a family tell;
  families that are not fitted yet follow the one of most fits.
  """
  own = sorted((k, tv) for (name, k), tv in known.items() if name == family.name)
  scale = 1.0
  if not own:
    others = {name for name, _ in known}
    if not others:
      return 0.0
    fullest = max(
      (f for f in FAMILIES if f.name in others and f.side == "query"),
      key=lambda f: sum(name == f.name for name, _ in known),
      default=None,
    )
    if fullest is None:
      return 0.0
    own = sorted((k, tv) for (name, k), tv in known.items() if name == fullest.name)
    scale = family.expected / fullest.expected
    count = max(count, 1)  # half a closure is expected in terms of one
  counts, logs = [k for k, _ in own], [math.log(max(tv, 1e-9)) for _, tv in own]
  return scale * math.exp(_line(counts, logs, count))


def _line(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
  """Interpolated linearly, and continued by the last two points."""
  if len(xs) == 1:
    return ys[0] + _SLOPE * (x - xs[0])
  right = next((i for i, known in enumerate(xs) if known >= x), len(xs) - 1)
  right = max(right, 1)
  slope = (ys[right] - ys[right - 1]) / (xs[right] - xs[right - 1])
  return ys[right] + min(max(slope, _STEEPEST), _FLATTEST) * (x - xs[right])


# Of log TV against closures: before two are known, and within what is believed.
_SLOPE, _STEEPEST, _FLATTEST = -0.5, -1.2, -0.03
