"""Unit directions to slice along, one set per head: `[heads, slices, dim]`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Directions = Float[Array, "heads slices dim"]


def gaussian(key: jax.Array, heads: int, slices: int, dim: int) -> Directions:
  """Independent directions, uniform on the sphere.

  Raises:
    ValueError: if a size is below one.
  """
  _check_sizes(heads, slices, dim)
  return normalise(jax.random.normal(key, (heads, slices, dim)))


def orthogonal(key: jax.Array, heads: int, slices: int, dim: int) -> Directions:
  """Uniform directions, orthogonal within each block of `dim` of a head.

  Sliced estimates have less variance with them (Rowland et al., 2019, "Orthogonal
  Estimation of Wasserstein Distances").

  Raises:
    ValueError: if a size is below one.
  """
  _check_sizes(heads, slices, dim)
  blocks = -(-slices // dim)
  rotations = jax.random.orthogonal(key, dim, (heads, blocks))
  return rotations.reshape(heads, blocks * dim, dim)[:, :slices]


def principal(covariance: Float[Array, "heads dim dim"], slices: int) -> Directions:
  """Eigenvectors of each head's covariance, largest eigenvalues first.

  The covariance is for instance the sum of the second moments of queries and keys over
  calibration data.

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
  """Vectors `[..., dim]` scaled to unit length; a null vector stays null."""
  squared = jnp.sum(directions**2, axis=-1, keepdims=True)
  # The inner `where` keeps the gradient of a null vector finite.
  return directions * jnp.where(
    squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0
  )


def _check_sizes(heads: int, slices: int, dim: int) -> None:
  for name, size in (("heads", heads), ("slices", slices), ("dim", dim)):
    if size < 1:
      raise ValueError(f"{name}={size}: expected at least 1")
