"""Duals to start Sinkhorn's iterations at, with nothing learned: zero, and Gaussian.

A start is named, so that it can be saved with a model and means the same on every
device.
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.masses import Masses, Side, log_masses
from asap_jax.numerics import float_dtype
from asap_jax.potentials.gaussian import gaussian_potential

Start = Literal[
  "zero", "gaussian", "gaussian_diagonal", "gaussian_low_rank", "gaussian_full"
]


def starting_dual(
  start: Start,
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  side: Side = "query",
) -> Float[Array, "*batch points"]:
  """The dual of one side that a start's name stands for.

  It contains the logarithms of float masses, so that a point is the same as two in its
  place that share its mass.

  Works under jit, vmap and grad.

  Args:
    start: `"zero"`; `"gaussian_diagonal"`, `"gaussian_low_rank"`, `"gaussian_full"`:
      `asap_jax.gaussian_potential` with covariances of that name; or `"gaussian"`: that
      of low rank.
    query: `[..., n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., m, dim]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: masses of the keys, `[..., m]`.
    side: whose dual, `"query"` or `"key"`.

  Returns:
    `[..., n]` or `[..., m]`, float32 or better.

  Raises:
    ValueError: for an unknown name, or as `asap_jax.gaussian_potential`.
  """
  check_start(start)
  of_masses = log_masses(query_weights if side == "query" else key_weights)
  if start == "zero":
    points = query if side == "query" else key
    return jnp.zeros(points.shape[:-1], float_dtype(query, key)) + of_masses
  name = start.removeprefix("gaussian").lstrip("_") or "low_rank"
  options: dict[str, Any] = {"covariances": name, "side": side}
  weights = query_weights, key_weights
  return gaussian_potential(query, key, *weights, **options) + of_masses


def check_start(start: str) -> None:
  """Raises ValueError unless `start` is a name that `starting_dual` knows."""
  if start not in get_args(Start):
    raise ValueError(f"start={start!r}: expected one of {', '.join(get_args(Start))}")
