"""Families of transport problems between clouds of points, to fit on and to test on."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from sklearn.datasets import load_digits

TOKEN_WIDTH, PROTOTYPES, COMPONENTS = 64, 8, 4
# Images of three digits in half of scikit-learn's, of which no point occurs twice.
MOST_POINTS = 256


class Clouds(NamedTuple):
  """Problems of equal size: points `[count, n, dim]` of each side and their masses."""

  x: np.ndarray
  y: np.ndarray
  a: np.ndarray
  b: np.ndarray


class Family(NamedTuple):
  """Problems that resemble each other.

  Attributes:
    draw: of a generator for the family, one for the problems, and the points a cloud,
      gives a function that draws both clouds of one problem.
    cost: -<x, y>, or |x - y|^2.
    epsilons: in units of the mean cost for `"squared"`.
    weighted: whether masses vary; a quarter of them is zero then.
  """

  draw: Callable[..., Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]]
  cost: Literal["product", "squared"]
  epsilons: tuple[float, ...]
  weighted: bool = False

  def problems(self, count: int, points: int, seed: int, *, test: bool) -> Clouds:
    """Draws problems; those to test on differ from those to fit on by their seed."""
    one = self.draw(np.random.default_rng([seed, 0]), points, test)
    random = np.random.default_rng([seed, 1 + test])
    drawn = [one(random) for _ in range(count)]
    x, y = (np.stack([pair[side] for pair in drawn]) for side in range(2))
    a, b = (self._masses(random, (count, points)) for _ in range(2))
    return Clouds(*(np.asarray(part, np.float32) for part in (x, y, a, b)))

  def _masses(self, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    if not self.weighted:
      return np.full(shape, 1.0 / shape[-1])
    masses = random.exponential(size=shape) * (np.arange(shape[-1]) % 4 > 0)
    return masses / masses.sum(-1, keepdims=True)


def attention(deviation: float, dim: int = 16):
  """Queries and keys of one layer: tokens around prototypes, two random projections.

  Logits have about this deviation.
  """

  def family(random, points, test):
    prototypes = random.normal(size=(PROTOTYPES, TOKEN_WIDTH))
    of_query, of_key = random.normal(size=(2, TOKEN_WIDTH, dim)) / TOKEN_WIDTH**0.5

    def one(random):
      kinds = random.integers(PROTOTYPES, size=points)
      tokens = prototypes[kinds] + 0.7 * random.normal(size=(points, TOKEN_WIDTH))
      query, key = tokens @ of_query, tokens @ of_key
      # Independent entries of deviation (1 + 0.49)^(1/2) a side.
      return query * deviation / (1.49 * dim**0.5), key

    return one

  return family


def mixtures(dim: int):
  """Two Gaussian mixtures whose centres move from problem to problem."""

  def family(random, points, test):
    centres = random.normal(size=(2, COMPONENTS, dim)) * 3 / 2**0.5
    shapes = random.normal(size=(2, COMPONENTS, dim, dim)) * 0.75 / dim**0.5

    def cloud(random, side):
      moved = centres[side] + 0.5 * random.normal(size=(COMPONENTS, dim))
      kinds = random.integers(COMPONENTS, size=points)
      normal = random.normal(size=(points, dim, 1))
      return moved[kinds] + (shapes[side][kinds] @ normal)[..., 0]

    return lambda random: (cloud(random, 0), cloud(random, 1))

  return family


def digit_sets(dim: int = 16):
  """Images of three digits against those of three others, leading components.

  Half of scikit-learn's images is there to fit on, the other to test on.
  """

  def family(random, points, test):
    images, labels = load_digits(return_X_y=True)
    images = (images - images.mean(0)) / 16.0
    _, _, components = np.linalg.svd(images, full_matrices=False)
    half = np.arange(len(images)) % 2 == test
    images, labels = images[half] @ components[:dim].T, labels[half]

    def one(random):
      kinds = random.permutation(10)
      sides = []
      for chosen in (kinds[:3], kinds[3:6]):
        rows = np.flatnonzero(np.isin(labels, chosen))
        sides.append(images[random.choice(rows, points, replace=False)])
      return tuple(sides)

    return one

  return family


FAMILIES = {
  "attention, modest logits": Family(attention(3.0), "product", (1.0,)),
  "attention, sharp logits": Family(attention(12.0), "product", (1.0,)),
  "mixtures, 2-D": Family(mixtures(2), "squared", (0.1, 0.01)),
  "mixtures, 2-D, masses": Family(mixtures(2), "squared", (0.1, 0.01), weighted=True),
  "mixtures, 16-D": Family(mixtures(16), "squared", (0.1, 0.01)),
  "digits, 16-D": Family(digit_sets(), "squared", (0.1, 0.01)),
}
