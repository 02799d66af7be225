r"""ESPFormer's attention: expected sliced plans of softly sorted queries and keys.

Shahbazi et al., 2025, "ESPFormer: Doubly-Stochastic Attention with Expected Sliced
Transport Plans", arXiv 2502.07962, algorithm 1. Along slice l, SoftSort (Prillo and
Eisenschlos, 2020, "SoftSort: A Continuous Relaxation for the argsort Operator") turns
projections x into a soft permutation matrix,

$U_{si} = softmax_i(-(sort(x)_s - x_i)^2 / t)$,

and the projected keys into V. The slice's plan is $U^T V$, its cost $D_l$ the mean of
$|q_i - k_j|^2$ under it, and slices weigh $softmax_l(-\tau D_l)$.

Rows of U sum to one but its columns only do so as t goes to zero, and so with rows and
columns of the plan; its total mass is n. Sorted hard (t = 0) the plan is doubly
stochastic exactly.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.masses import zero_invalid
from asap_jax.numerics import exact_einsum
from asap_jax.peers.coupling import (
  ascending_order,
  couple,
  gather,
  per_query,
  project,
)
from asap_jax.potentials.directions import normalise


class SoftPlan(NamedTuple):
  """Plans $U^T V$ along slices, weighted; each matrix enters one product alone.

  Attributes:
    queries: U times its row sums, `[..., slices, n, n]`, sorted place by query.
    keys: V, not divided by its row sums, `[..., slices, n, n]`.
    inputs: of the call, keys scaled.
    inverse_temperature: tau of the weights of the slices.
  """

  queries: Float[Array, "*batch slices n n"]
  keys: Float[Array, "*batch slices n n"]
  inputs: Inputs
  inverse_temperature: float | Array

  def dense(self) -> Float[Array, "*batch n n"]:
    """Attention weights, in O(slices n^3) time, unlike `apply`."""
    weights, _ = self._transported(self.inputs.value[..., :0])
    queries, keys = normalised_rows(self.queries), normalised_rows(self.keys)
    weighted = weights[..., None, None] * keys
    return jnp.einsum("...lsi,...lsj->...ij", queries, weighted)

  def apply(
    self,
    value: Float[Array, "*batch n features"],
    precision: jax.lax.PrecisionLike = None,
  ) -> Float[Array, "*batch n features"]:
    """Weights times values in O(slices n^2), in the dtype of the values.

    `precision` is without effect: costs, which share the products, need the highest.
    """
    weights, moved = self._transported(value.astype(self.keys.dtype))
    return jnp.einsum("...l,...liv->...iv", weights, moved).astype(value.dtype)

  def _transported(self, value: Array) -> tuple[Array, Array]:
    r"""Weights of the slices, and values moved by the plan of each.

    With $P = U^T V$ the cost is $\sum_i |q_i|^2 (P 1)_i + (P |k|^2)_i - 2 q_i (P k)_i$,
    so that it takes more columns of values, but no second product with P.
    """
    query, key = self.inputs.query, self.inputs.key
    # Distances do not change, and lose less, around the middle of the keys.
    middle = jax.lax.stop_gradient(key.mean(-2, keepdims=True))
    query, key = query - middle, key - middle
    dim = key.shape[-1]
    squares = jnp.sum(key**2, -1, keepdims=True)
    columns = jnp.concatenate([key, squares, jnp.ones_like(squares), value], axis=-1)
    placed = exact_einsum("...lsj,...jc->...lsc", self.keys, columns)
    # The ones give the row sums of V; of U they scale what its product sums over.
    sums = placed[..., dim + 1, None] * self.queries.sum(-1)[..., None]
    placed = placed / jnp.where(sums > 0, sums, 1.0)
    moved = exact_einsum("...lsi,...lsc->...lic", self.queries, placed)
    of_key, of_squares, mass, values = jnp.split(moved, [dim, dim + 1, dim + 2], -1)
    query = query[..., None, :, :]
    costs = jnp.sum(query**2, -1, keepdims=True) * mass + of_squares
    costs = costs[..., 0] - 2 * jnp.sum(query * of_key, axis=-1)
    costs = per_query(self.inputs, costs.sum(-1))
    return jax.nn.softmax(-self.inverse_temperature * costs, axis=-1), values


@attention_fn(takes_bias=False)
def esp_attention(
  inputs: Inputs,
  *,
  directions: Float[Array, "heads slices dim"] | None = None,
  sort_temperature: float | Array = 1e-3,
  inverse_temperature: float | Array = 0.1,
  hard: bool = False,
) -> Array:
  """ESPFormer's attention (module docstring), for as many queries as keys.

  Works under jit, vmap and grad, in `directions` and temperatures too. Sorted hard,
  gradients reach queries and keys through the weights of the slices alone, and
  directions not at all.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, but `scale` multiplies
      queries and keys each (as in the authors' code), `bias` must be `None`, and the
      mask is as in `asap_jax.sinkhorn_attention`, with as many valid queries as valid
      keys.
    directions: slices per head, `[heads, slices, dim]`, normalised here; the coordinate
      axes by default, the paper's choice.
    sort_temperature: t of SoftSort, positive.
    inverse_temperature: tau of the weights of the slices.
    hard: sorts exactly, for inference: a gather and no n x n matrix.

  Returns:
    As `asap_jax.sinkhorn_attention`. Under jit, an element with unequal numbers of
    valid queries and keys is NaN.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`; if n and m, or the numbers of valid
      queries and keys, differ; if `directions` do not fit.
  """
  inputs = _check_counts(inputs)
  inputs = dataclasses.replace(inputs, key=inputs.key * inputs.scale)
  if directions is not None:
    directions = normalise(directions)
  if hard:
    pair = inputs.query, inputs.key
    couplings = couple(*pair, directions, *inputs.masks, paired=True)
    apart = inputs.query[..., None, :, :] - gather(inputs.key, couplings.keys)
    costs = per_query(inputs, (couplings.shares[..., None] * apart**2).sum((-2, -1)))
    weights = jax.nn.softmax(-inverse_temperature * costs, axis=-1)
    return inputs.attend(couplings.weighted(weights))
  queries, keys = (
    soft_sort(project(points, directions), sort_temperature, mask)
    for points, mask in zip((inputs.query, inputs.key), inputs.masks, strict=True)
  )
  return inputs.attend(SoftPlan(queries, keys, inputs, inverse_temperature))


def soft_sort(
  x: Float[Array, "*batch slices n"],
  temperature: float | Array,
  mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "*batch slices n n"]:
  """SoftSort, ascending, before rows are divided by their sums: place by point.

  Points that are not valid have no place: their rows and columns are zero.
  """
  order = ascending_order(x, mask)
  mask = None if mask is None else mask[..., None, :]
  x = zero_invalid(x, mask)
  places = jnp.take_along_axis(x, order, axis=-1)
  # At most one, and one at the point whose place it is: no maximum to subtract.
  kernel = jnp.exp((places[..., :, None] - x[..., None, :]) ** 2 * (-1.0 / temperature))
  if mask is None:
    return kernel
  taken = jnp.arange(x.shape[-1]) < mask.sum(-1, keepdims=True)
  return jnp.where(taken[..., None] & mask[..., None, :], kernel, 0.0)


def normalised_rows(kernel: Array) -> Array:
  """Rows divided by their sums; zero rows stay zero."""
  sums = kernel.sum(-1, keepdims=True)
  return kernel / jnp.where(sums > 0, sums, 1.0)


def _check_counts(inputs: Inputs) -> Inputs:
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  if n != m:
    raise ValueError(
      f"query has {n} tokens, key {m}: soft permutations exist between equal numbers; "
      "use est_attention for cross-attention"
    )
  if inputs.query_mask is None or inputs.key_mask is None:
    return inputs
  queries, keys = inputs.query_mask.sum(-1), inputs.key_mask.sum(-1)
  equal = (queries == keys)[..., None, None]
  if isinstance(equal, jax.core.Tracer):
    # Nothing can be raised here: `attend` gives NaN where the mask is no product.
    known = inputs.is_product
    return dataclasses.replace(
      inputs, is_product=equal if known is None else equal & known
    )
  if not equal.all():
    raise ValueError(
      f"mask has {queries.ravel()} valid queries and {keys.ravel()} valid keys: soft "
      "permutations exist between equal numbers; use est_attention"
    )
  return inputs
