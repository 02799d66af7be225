"""Flax NNX modules that hold a peer's parameters, each an `attention_fn` of a layer.

They are called with the signature of `asap_jax.softmax_attention`, and their parameters
train with the model's: `nnx.MultiHeadAttention(..., attention_fn=LOTAttention(...))`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from asap_jax.peers.differential import (
  DifferentialParameters,
  differential_attention,
  lambda_init,
)
from asap_jax.peers.esp import esp_attention
from asap_jax.peers.lot import Pivot, lot_attention
from asap_jax.peers.qontot import qontot_attention, theta_size
from asap_jax.potentials import directions as directions_


class ESPAttention(nnx.Module):
  """ESPFormer's attention with learned directions, orthogonal at the start.

  Without learned directions bind `esp_attention` itself: it has nothing to learn.

  Args:
    heads: number of heads.
    slices: directions per head.
    dim: head dimension.
    rngs: source of the start, stream `params`.
    **options: bound to `esp_attention`; hashable values.
  """

  def __init__(
    self, heads: int, slices: int, dim: int, *, rngs: nnx.Rngs, **options: Any
  ):
    start = directions_.orthogonal(rngs.params(), heads, slices, dim)
    self.directions = nnx.Param(start)
    self.options = _hashable(options)

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """`esp_attention` along these directions; see there."""
    options = dict(self.options) | kwargs
    return esp_attention(*args, directions=self.directions[...], **options)


class LOTAttention(nnx.Module):
  """LOTFormer's attention with its pivot.

  Args:
    heads: number of heads.
    pivots: r, points of each head's pivot.
    dim: head dimension.
    rngs: source of the points, normal of variance 1 / dim, stream `params`; masses
      start equal.
    **options: bound to `lot_attention`; hashable values.
  """

  def __init__(
    self, heads: int, pivots: int, dim: int, *, rngs: nnx.Rngs, **options: Any
  ):
    points = jax.random.normal(rngs.params(), (heads, pivots, dim)) / jnp.sqrt(dim)
    self.points = nnx.Param(points)
    self.masses = nnx.Param(jnp.zeros((heads, pivots)))
    self.options = _hashable(options)

  @property
  def pivot(self) -> Pivot:
    """Pivot of the current parameters."""
    return Pivot(self.points[...], self.masses[...])

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """`lot_attention` through this pivot; see there."""
    options = dict(self.options) | kwargs
    return lot_attention(*args, pivot=self.pivot, **options)


class QontOTAttention(nnx.Module):
  """Attention by a simulated quantum circuit with learned factors of the logits.

  With fixed factors bind `qontot_attention` itself: it has nothing to learn.

  Args:
    heads: number of heads.
    length: tokens of every sequence, padding included.
    layers: of the circuit.
    auxiliaries: auxiliary qubits.

  Raises:
    ValueError: as `qontot_attention`.
  """

  def __init__(self, heads: int, length: int, layers: int = 16, auxiliaries: int = 1):
    size = theta_size(length, layers, auxiliaries)
    # As the function has it.
    self.theta = nnx.Param(jnp.ones((heads, size)))
    self.options = _hashable({"layers": layers, "auxiliaries": auxiliaries})

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """`qontot_attention` with these factors; see there."""
    options = dict(self.options) | kwargs
    return qontot_attention(*args, theta=self.theta[...], **options)


class DifferentialAttention(nnx.Module):
  """Differential attention with its lambda and the gain of its norm.

  Args:
    dim: head dimension of queries and keys, even.
    layer: of the model, counted from one: sets `lambda_init`.
    features: head dimension of the values, `dim` by default.
    rngs: source of the vectors, normal of deviation 0.1, stream `params`; the gain
      starts at one.
    **options: bound to `differential_attention`; hashable values.

  Raises:
    ValueError: if `dim` is odd or `layer` is below one.
  """

  def __init__(
    self,
    dim: int,
    layer: int,
    *,
    features: int | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    if dim % 2:
      raise ValueError(f"dim={dim}: expected an even number")
    vectors = 0.1 * jax.random.normal(rngs.params(), (4, dim // 2))
    self.vectors = nnx.Param(vectors)
    self.gain = nnx.Param(jnp.ones(dim if features is None else features))
    self.options = _hashable({"initial": lambda_init(layer)} | options)

  @property
  def parameters(self) -> DifferentialParameters:
    """Current parameters, as `differential_attention` takes them."""
    query_1, key_1, query_2, key_2 = self.vectors[...]
    return DifferentialParameters(query_1, key_1, query_2, key_2, self.gain[...])

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """`differential_attention` with these parameters; see there."""
    options = dict(self.options) | kwargs
    return differential_attention(*args, parameters=self.parameters, **options)


def _hashable(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
  return tuple(sorted(options.items()))
