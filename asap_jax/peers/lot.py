r"""LOTFormer's attention: transport through a learned pivot, in linear time.

Shahbazi et al., 2025, "LOTFormer: Doubly-Stochastic Linear Attention via Low-Rank
Optimal Transport", arXiv 2509.23436. A pivot measure of r points z with masses p lies
between queries and keys: with $\Gamma_1$ the entropic plan from queries to pivot and
$\Gamma_2$ from pivot to keys, the attention is $n \Gamma_1 diag(1 / p) \Gamma_2$, of
rank r at most. Both factors are row-stochastic softmaxes with a dual for bias,
$n \Gamma_1 = softmax_k(q_i z_k + g_k)$ and
$diag(1 / p) \Gamma_2 = softmax_j(z_k k_j + h_j)$, with g and h from Sinkhorn's
iterations, so that rows of the product are exact after any number of them, and columns
at convergence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.c_transform.entropic import closures
from asap_jax.masses import valid, zero_invalid
from asap_jax.numerics import logits_einsum


class Pivot(NamedTuple):
  """Pivot measure of each head: a pytree of parameters.

  Attributes:
    points: z, `[heads, r, dim]`.
    masses: logits of p, `[heads, r]`.
  """

  points: Float[Array, "heads r dim"]
  masses: Float[Array, "heads r"]


class LowRankPlan(NamedTuple):
  """Attention weights as a product of two row-stochastic matrices.

  Attributes:
    left: `[..., n, r]`.
    right: `[..., r, m]`.
  """

  left: Float[Array, "*batch n r"]
  right: Float[Array, "*batch r m"]

  def dense(self) -> Float[Array, "*batch n m"]:
    """Attention weights."""
    return self.left @ self.right

  def apply(
    self,
    value: Float[Array, "*batch m features"],
    precision: jax.lax.PrecisionLike = None,
  ) -> Float[Array, "*batch n features"]:
    """Weights times values from the right, in the dtype of the values."""
    wide = value.astype(self.right.dtype)
    collected = jnp.einsum("...rm,...mv->...rv", self.right, wide, precision=precision)
    out = jnp.einsum("...nr,...rv->...nv", self.left, collected, precision=precision)
    return out.astype(value.dtype)


@attention_fn(takes_bias=False)
def lot_attention(inputs: Inputs, *, pivot: Pivot, iterations: int = 5) -> Array:
  """LOTFormer's attention (module docstring), O((n + m) r), for any n and m.

  Works under jit, vmap and grad, in `pivot` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, but `scale` and `epsilon`
      are those of both products with the pivot, `bias` must be `None`, and the mask is
      as in `asap_jax.sinkhorn_attention`.
    pivot: points and masses of each head.
    iterations: full Sinkhorn iterations of each of the two plans.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `pivot` does not fit.
  """
  _check_pivot(pivot, inputs.query.shape)
  if iterations < 1:
    raise ValueError(f"iterations={iterations}: expected at least one")
  points = pivot.points.astype(inputs.query.dtype)
  masses = jax.nn.softmax(pivot.masses.astype(inputs.query.dtype), axis=-1)
  to_pivot = logits_einsum(
    "...hnd,hrd->...hnr", inputs.query, points, precision=inputs.precision
  )
  to_keys = logits_einsum(
    "hrd,...hmd->...hrm", points, inputs.scale * inputs.key, precision=inputs.precision
  )
  left = _row_stochastic(to_pivot, iterations, inputs.query_mask, masses)
  right = _row_stochastic(to_keys, iterations, masses, inputs.key_mask)
  return inputs.attend(LowRankPlan(left, right))


def _row_stochastic(
  logits: Array, iterations: int, rows: Array | None, columns: Array | None
) -> Array:
  """Entropic plan with every row scaled to sum to one, zero at absent points."""
  start = jnp.zeros(logits.shape[:-1], logits.dtype)
  g = closures(logits, start, iterations, rows, columns).g
  return softmax_with(g, logits, rows, columns)


def softmax_with(
  g: Array, logits: Array, rows: Array | None, columns: Array | None
) -> Array:
  """Softmax of logits that carry a dual of the keys, zero at absent points."""
  there = valid(columns)
  there = None if there is None else there[..., None, :]
  weights = jax.nn.softmax(logits + g[..., None, :], axis=-1, where=there)
  return zero_invalid(weights, rows, axis=-2)


def _check_pivot(pivot: Pivot, query_shape: tuple[int, ...]) -> None:
  heads, _, dim = query_shape[-3:]
  points, masses = pivot.points.shape, pivot.masses.shape
  if (points[0], points[-1]) != (heads, dim) or masses != points[:-1]:
    raise ValueError(
      f"pivot has points {points} and masses {masses}: expected [{heads}, r, {dim}] "
      f"and [{heads}, r]"
    )
