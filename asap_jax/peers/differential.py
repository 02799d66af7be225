r"""Differential attention: the difference of two softmax maps.

Ye et al., 2024, "Differential Transformer", arXiv 2410.05258, section 2. Queries and
keys of a head are cut into halves, and with $\delta = \sqrt{dim / 2}$ the weights are
$softmax(q_1 k_1^T / \delta) - \lambda softmax(q_2 k_2^T / \delta)$, where
$\lambda = e^{a_1 b_1} - e^{a_2 b_2} + \lambda_{init}$ has learned vectors a and b. Each
head's result then goes through an RMS norm of its own and is multiplied by
$1 - \lambda_{init}$. Weights may be negative, rows sum to $1 - \lambda$ and columns to
anything: this is not doubly stochastic.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn


class DifferentialParameters(NamedTuple):
  """Learned parameters of a layer, shared by its heads: a pytree.

  Attributes:
    query_1: $a_1$, `[dim / 2]`.
    key_1: $b_1$, `[dim / 2]`.
    query_2: $a_2$, `[dim / 2]`.
    key_2: $b_2$, `[dim / 2]`.
    gain: of the RMS norm, `[features]`.
  """

  query_1: Float[Array, "half"]
  key_1: Float[Array, "half"]
  query_2: Float[Array, "half"]
  key_2: Float[Array, "half"]
  gain: Float[Array, "features"]


def lambda_init(layer: int) -> float:
  """Start of lambda in a layer, $0.8 - 0.6 e^{-0.3 (layer - 1)}$.

  Args:
    layer: of the model, counted from one.

  Returns:
    A number from 0.2 to 0.8.

  Raises:
    ValueError: if `layer` is below one.
  """
  if layer < 1:
    raise ValueError(f"layer={layer}: expected layers counted from 1")
  return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


def differential_lambda(
  parameters: DifferentialParameters, initial: float
) -> Float[Array, ""]:
  """Lambda, the weight of the second map; `initial` is `lambda_init` of the layer."""
  first = jnp.exp(jnp.vdot(parameters.query_1, parameters.key_1))
  second = jnp.exp(jnp.vdot(parameters.query_2, parameters.key_2))
  return first - second + initial


@attention_fn(any_mask=True, parts=2)
def differential_attention(
  inputs: Inputs,
  *,
  parameters: DifferentialParameters,
  initial: float = 0.8,
  normalise: bool = True,
) -> Array:
  """Differential attention (module docstring); not doubly stochastic.

  The first half of each head's features makes the first map. A baseline Transformer of
  as many parameters has twice the heads of half the dimension. Works under jit, vmap
  and grad, in `parameters` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, any mask included;
      `scale` is by default 1 / sqrt(dim / 2), and a bias is added to the logits of both
      maps.
    parameters: of the layer.
    initial: `lambda_init` of the layer; its limit for deep layers by default.
    normalise: whether each head's result is normalised and multiplied by 1 - initial.

  Returns:
    As `asap_jax.softmax_attention`; the weights sown are the difference of the maps.

  Raises:
    ValueError: as `asap_jax.softmax_attention`, and if the head dimension is odd or
      `parameters` do not fit.
  """
  _check_parameters(parameters, inputs.query.shape[-1], inputs.value.shape[-1])
  halves = (jnp.split(x, 2, axis=-1) for x in (inputs.query, inputs.key))
  logits = (
    dataclasses.replace(inputs, query=query, key=key).logits
    for query, key in zip(*halves, strict=True)
  )
  first, second = (jax.nn.softmax(x, axis=-1, where=inputs.allowed) for x in logits)
  out = inputs.attend(first - differential_lambda(parameters, initial) * second)
  if not normalise:
    return out
  wide = out.astype(first.dtype)
  power = jnp.mean(wide**2, axis=-1, keepdims=True)
  normal = wide * jax.lax.rsqrt(power + 1e-5) * parameters.gain
  return ((1.0 - initial) * normal).astype(out.dtype)


def _check_parameters(
  parameters: DifferentialParameters, dim: int, features: int
) -> None:
  if dim % 2:
    raise ValueError(f"query has head dimension {dim}: expected an even number")
  expected = [(dim // 2,)] * 4 + [(features,)]
  shapes = [array.shape for array in parameters]
  if shapes != expected:
    raise ValueError(f"parameters have shapes {shapes}: expected {expected}")
