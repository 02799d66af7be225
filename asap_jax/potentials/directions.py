"""Unit directions to slice along, one set per head: `[heads, slices, dim]`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from scipy.stats import qmc

Directions = Float[Array, "heads slices dim"]


def gaussian(key: jax.Array, heads: int, slices: int, dim: int) -> Directions:
  """Independent directions, uniform on the sphere.

  Args:
    key: PRNG key.
    heads: number of heads.
    slices: directions per head.
    dim: head dimension.

  Returns:
    Unit vectors `[heads, slices, dim]`.

  Raises:
    ValueError: if a size is below one.
  """
  _check_sizes(heads, slices, dim)
  return normalise(jax.random.normal(key, (heads, slices, dim)))


def orthogonal(key: jax.Array, heads: int, slices: int, dim: int) -> Directions:
  """Uniform directions, orthogonal within each block of `dim` of a head.

  Sliced estimates have less variance with them (Rowland et al., 2019, "Orthogonal
  Estimation of Wasserstein Distances"). Arguments, result and errors as in `gaussian`.
  """
  _check_sizes(heads, slices, dim)
  blocks = -(-slices // dim)
  rotations = jax.random.orthogonal(key, dim, (heads, blocks))
  return rotations.reshape(heads, blocks * dim, dim)[:, :slices]


def quasi_monte_carlo(key: jax.Array, heads: int, slices: int, dim: int) -> Directions:
  """Sobol points, shifted at random for each head, mapped to the sphere.

  The points go through the inverse normal distribution and are normalised (Nguyen et
  al., 2024, "Quasi-Monte Carlo for 3D Sliced Wasserstein", section 3). Arguments,
  result and errors as in `gaussian`.
  """
  _check_sizes(heads, slices, dim)
  # Drawn in a power of two, which keeps the sequence balanced; one fixed scramble
  # takes away its degenerate first points, the shift per head does the rest.
  sobol = qmc.Sobol(dim, scramble=True, rng=0).random_base2(
    math.ceil(math.log2(slices))
  )
  shift = jax.random.uniform(key, (heads, 1, dim))
  points = (jnp.asarray(sobol[:slices], jnp.float32) + shift) % 1.0
  edge = 2.0**-20
  return normalise(jax.scipy.special.ndtri(jnp.clip(points, edge, 1.0 - edge)))


def principal(covariance: Float[Array, "heads dim dim"], slices: int) -> Directions:
  """The eigenvectors of each head's covariance with the largest eigenvalues.

  Args:
    covariance: symmetric matrices `[heads, dim, dim]`, for instance the sum of the
      second moments of queries and keys over calibration data.
    slices: directions per head, at most `dim`.

  Returns:
    Unit vectors `[heads, slices, dim]`, largest eigenvalue first.

  Raises:
    ValueError: if `slices` is below one or above `dim`.
  """
  dim = covariance.shape[-1]
  if not 1 <= slices <= dim:
    raise ValueError(
      f"slices={slices}: a covariance of dimension {dim} has 1 to {dim} principal "
      "directions"
    )
  _, vectors = jnp.linalg.eigh(covariance)
  return jnp.swapaxes(vectors, -1, -2)[:, ::-1][:, :slices]


def normalise(directions: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
  """Scales vectors `[..., dim]` to unit length; a null vector stays null."""
  squared = jnp.sum(directions**2, axis=-1, keepdims=True)
  # The inner `where` keeps the gradient of a null vector finite.
  return directions * jnp.where(
    squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0
  )


def _check_sizes(heads: int, slices: int, dim: int) -> None:
  for name, size in (("heads", heads), ("slices", slices), ("dim", dim)):
    if size < 1:
      raise ValueError(f"{name}={size}: expected at least 1")
