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
    """Whether it computes all that another does, and so takes no less time.

    A network adds more than the Gaussian's diagonal, which it does without.
    """
    own = {*self.features, *(("gaussian_diagonal",) if self.hidden else ())}
    return (
      self.side == other.side
      and own >= set(other.features)
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
  families that are fitted less follow the one of most fits.
  """
  fits: dict[str, list[tuple[int, float]]] = {}
  for (name, k), tv in sorted(known.items()):
    fits.setdefault(name, []).append((k, math.log(max(tv, 1e-9))))
  own = fits.pop(family.name, [])
  fullest = max(
    (f for f in FAMILIES if f.name in fits and f.side == "query"),
    key=lambda f: len(fits[f.name]),
    default=None,
  )
  if fullest is None:
    return math.exp(_line(own, count)) if own else 0.0
  others = fits[fullest.name]
  count = max(count, 1)  # half a closure is expected in terms of one
  if not own:
    return family.expected / fullest.expected * math.exp(_line(others, count))
  if len(own) == 1 < len(others):
    # One fit tells where it begins, the others how fast it falls.
    ((k, log),) = own
    return math.exp(log + _line(others, count) - _line(others, max(k, 1)))
  return math.exp(_line(own, count))


def _line(points: Sequence[tuple[int, float]], x: int) -> float:
  """Interpolated linearly, and continued by the two points at that end."""
  if len(points) == 1:
    ((first, y),) = points
    return y + _SLOPE * (x - first)
  right = next((i for i, (known, _) in enumerate(points) if known >= x), -1)
  right = max(right % len(points), 1)
  (before, above), (after, below) = points[right - 1], points[right]
  slope = (below - above) / (after - before)
  return below + min(max(slope, _STEEPEST), _FLATTEST) * (x - after)


# Of log TV against closures: before two are known, and within what is believed.
_SLOPE, _STEEPEST, _FLATTEST = -0.5, -1.2, -0.03
