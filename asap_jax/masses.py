"""Masses of points: what `None`, a boolean mask and float masses mean everywhere.

Functions of this package take masses `[..., n]` per side, one of

- `None`: n points of equal mass;
- boolean: a mask; the valid points share the mass equally, the others have none;
- float: non-negative masses up to a factor; zero means that the point is absent.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from asap_jax.numerics import float_dtype
from asap_jax.sizes import Size

Masses = Float[Array, "..."] | Bool[Array, "..."] | None
# Of a plan: rows are queries, columns keys.
Side = Literal["query", "key"]


def check_weights(name: str, weights: Masses, size: Size) -> None:
  """Raises ValueError unless `weights` is `None`, boolean or float `[..., size]`."""
  if weights is None:
    return
  if weights.dtype != jnp.bool_ and not jnp.issubdtype(weights.dtype, jnp.floating):
    raise ValueError(f"{name} has dtype {weights.dtype}: expected boolean or float")
  if weights.ndim == 0 or weights.shape[-1] != size:
    raise ValueError(f"{name} has shape {weights.shape}: expected [..., {size}]")


def check_dual(name: str, dual: Array, size: int) -> None:
  """Raises ValueError unless a dual is `[..., size]`."""
  if dual.ndim == 0 or dual.shape[-1] != size:
    raise ValueError(f"{name} has shape {dual.shape}: expected [..., {size}]")


def check_clouds(
  query: Array, key: Array, query_weights: Masses, key_weights: Masses
) -> None:
  """Raises ValueError unless points `[..., size, dim]` and their masses fit."""
  shapes = f"query {query.shape} and key {key.shape}"
  if min(query.ndim, key.ndim) < 2:
    raise ValueError(f"{shapes}: expected [..., length, dim] for each")
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(f"{shapes}: expected the same last dimension")
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])


def valid(weights: Masses) -> Bool[Array, "..."] | None:
  """Points that carry mass, `[..., n]`; `None` if all do."""
  if weights is None or weights.dtype == jnp.bool_:
    return weights
  return weights > 0


def valid_pairs(
  query_weights: Masses, key_weights: Masses
) -> Bool[Array, "... #n #m"] | None:
  """Pairs whose query and key carry mass, `[..., n, m]`; `None` if all do."""
  rows, columns = valid(query_weights), valid(key_weights)
  rows = None if rows is None else rows[..., :, None]
  columns = None if columns is None else columns[..., None, :]
  if rows is None or columns is None:
    return columns if rows is None else rows
  return rows & columns


def by_slice(*weights: Masses) -> list[Masses]:
  """Masses `[..., n]` as `[..., 1, n]`, for points that are laid out by slice."""
  return [w if w is None else w[..., None, :] for w in weights]


def normalised(weights: Masses, size: Size) -> Float[Array, "... n"]:
  """Masses `[..., size]` that sum to one (to zero where no point is valid)."""
  if weights is None:
    return jnp.full((size,), 1.0 / max(size, 1), jnp.float32)
  weights = weights.astype(float_dtype(weights))
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1.0)


def log_masses(weights: Masses) -> Float[Array, "..."]:
  """Logarithms of masses, zero where there is none; zero for points of equal mass.

  A dual contains them (`asap_jax.Duals`), and a potential does not: points in one place
  have one potential, whatever their masses.
  """
  if weights is None or weights.dtype == jnp.bool_:
    return jnp.zeros((), jnp.float32)
  return jnp.log(jnp.where(weights > 0, weights, 1.0))


def zero_invalid(
  values: Shaped[Array, "..."], weights: Masses, axis: int = -1
) -> Shaped[Array, "..."]:
  """`values` with exact zeros, and zero gradients, where no mass lies along `axis`."""
  mask = valid(weights)
  if mask is None:
    return values
  return jnp.where(_along(mask, axis), values, jnp.zeros((), values.dtype))


def mean(
  values: Float[Array, "..."], weights: Masses, axis: int = -1
) -> Float[Array, "..."]:
  """Weighted mean of `values` along `axis` (negative), which is kept with size one."""
  if weights is None:
    return values.mean(axis, keepdims=True)
  mass = _along(normalised(weights, values.shape[axis]), axis)
  return jnp.sum(zero_invalid(values, weights, axis) * mass, axis, keepdims=True)


def centre(
  values: Float[Array, "..."], weights: Masses, axis: int = -1
) -> Float[Array, "..."]:
  """`values` less their weighted mean along `axis`; zero where no mass lies."""
  return zero_invalid(values - mean(values, weights, axis), weights, axis)


def _along(weights: Array, axis: int) -> Array:
  """Weights `[..., n]` broadcast against values whose `axis` (negative) has n."""
  return weights.reshape(*weights.shape, *(1,) * (-1 - axis))
