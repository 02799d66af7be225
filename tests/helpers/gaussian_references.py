"""Entropic potentials of Gaussians in NumPy float64, one sequence at a time.

They are up to a constant, and centred here.
"""

import numpy as np
from helpers import oracles
from scipy import linalg

COVARIANCES = ("diagonal", "low_rank", "full")
SIDES = ("query", "key")


def masses(weights, size):
  """Masses that sum to one, or to zero where there is no point."""
  if weights is not None and not np.any(np.asarray(weights) > 0):
    return np.zeros(size)
  return np.array(oracles.masses(weights, size), np.float64)


def moments(points, weights=None):
  """Masses, mean and covariance; absent points may hold anything."""
  mass = masses(weights, len(points))
  points = np.where(mass[:, None] > 0, np.asarray(points, np.float64), 0.0)
  mean = mass @ points
  x = (points - mean) * (mass[:, None] > 0)
  return mass, mean, (x * mass[:, None]).T @ x


def full(a, b):
  """V of covariances A and B."""
  eye = np.eye(len(a))
  root = np.real(linalg.sqrtm(a @ b + eye / 4))
  return b @ np.linalg.inv(eye / 2 + root)


def diagonal(a, b):
  """V of each coordinate by itself."""
  a, b = np.diag(a), np.diag(b)
  return np.diag(b / (0.5 + np.sqrt(a * b + 0.25)))


def low_rank(a, b, rank):
  """V exact in the range of B A applied to cosines, else by coordinates of A and of
  what is left of B.
  """
  dim = len(a)
  if rank >= dim:
    return full(a, b)
  angles = np.outer(np.arange(dim) + 0.5, np.arange(rank))
  u, sizes, _ = np.linalg.svd(b @ a @ np.cos(np.pi * angles / dim), full_matrices=False)
  basis = u[:, sizes > 1e-9 * max(sizes.max(), 1e-300)]
  inside = full(*(basis.T @ each @ basis for each in (a, b)))
  rest = np.eye(dim) - basis @ basis.T
  by_coordinate = diagonal(a, rest @ b @ rest)
  correction = inside - basis.T @ by_coordinate @ basis
  return by_coordinate + basis @ correction @ basis.T


def quadratic(points, weights, others, other_weights, coefficients):
  """-x^T b - (x - a)^T V (x - a) / 2, centred, zero at absent points.

  `coefficients` is V, or a function of A and B.
  """
  mass, at, a = moments(points, weights)
  _, at_others, b = moments(others, other_weights)
  v = coefficients(a, b) if callable(coefficients) else coefficients
  x = np.where(mass[:, None] > 0, np.asarray(points, np.float64), 0.0) - at
  return centred(-x @ at_others - np.einsum("nd,de,ne->n", x, v, x) / 2, mass)


def potential(
  query, key, weights=(None, None), covariances="full", rank=4, side="query"
):
  """f or g, centred over the present points."""
  of = {
    "full": full,
    "diagonal": diagonal,
    "low_rank": lambda a, b: low_rank(a, b, rank),
  }[covariances]
  sides = [(query, weights[0]), (key, weights[1])]
  own, other = sides if side == "query" else sides[::-1]
  return quadratic(*own, *other, of)


def centred(f, mass):
  """f less its mean over masses, zero at absent points."""
  f = np.asarray(f, np.float64)
  return (f - mass @ f) * (mass > 0)
