"""Attention by sliced transport plans without regularisation: min-SWGG and EST.

Along each slice the optimal coupling of the projected queries and keys is found by
sorting and lifted to the tokens themselves. min-SWGG keeps the slice whose coupling
costs least (Mahey et al., 2023, "Fast Optimal Transport through Sliced Generalized
Wasserstein Geodesics", arXiv 2307.01770); the expected sliced transport plan averages
over slices, weighted by $e^{-t cost}$ (Liu et al., 2025, "Expected Sliced Transport
Plans", arXiv 2410.12176). The cost is minus the logits. For plans of these marginals it
ranks slices as the papers' squared distance of scaled tokens does.

Rows and columns are exact, for any number of queries and keys and any padding, and no
n x m matrix is formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.peers.coupling import Couplings, couple, per_query

Directions = Float[Array, "heads slices dim"]


@attention_fn
def swgg_attention(inputs: Inputs, *, directions: Directions | None = None) -> Array:
  """Coupling of the slice with the greatest mean logit (min-SWGG).

  A permutation where there are as many queries as keys. Works under jit, vmap and grad;
  the plan is piecewise constant, so queries, keys, bias and directions get gradients of
  zero and only the values learn.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    directions: slices per head, `[heads, slices, dim]`; coordinate axes by default.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `directions` do not fit.
  """
  couplings = couple(inputs.query, inputs.key, directions, *inputs.masks)
  best = jnp.argmin(mean_costs(inputs, couplings), axis=-1)
  return inputs.attend(couplings.choose(best))


@attention_fn
def est_attention(
  inputs: Inputs,
  *,
  directions: Directions | None = None,
  inverse_temperature: float | Array = 0.0,
) -> Array:
  """Mean of all slices' couplings, each weighted by $e^{-t cost}$ (EST).

  Works under jit, vmap and grad. Couplings are piecewise constant: queries, keys and
  bias get gradients through the weights of the slices alone (none if t is zero),
  directions none.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    directions: slices per head, `[heads, slices, dim]`; coordinate axes by default.
    inverse_temperature: t; the cost is minus the mean logit of the coupling. At zero
      all slices weigh alike, towards infinity it is `swgg_attention`.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `directions` do not fit.
  """
  couplings = couple(inputs.query, inputs.key, directions, *inputs.masks)
  costs = mean_costs(inputs, couplings)
  weights = jax.nn.softmax(-inverse_temperature * costs, axis=-1)
  return inputs.attend(couplings.weighted(weights))


def mean_costs(
  inputs: Inputs, couplings: Couplings
) -> Float[Array, "*batch heads slices"]:
  """Cost of each coupling: minus its logit, mean over the valid queries."""
  moved = couplings.moved(inputs.key)
  if couplings.queries is None:
    score = jnp.einsum("...nd,...lnd->...l", inputs.query, moved)
  else:
    # Entry by entry: a sum over the entries of each query would take a scatter.
    at = inputs.query[..., None, :, :], couplings.queries[..., None]
    score = (jnp.take_along_axis(*at, axis=-2) * moved).sum((-2, -1))
  if inputs.bias is not None:
    n, m = couplings.size
    rows = jnp.arange(n) if couplings.queries is None else couplings.queries
    index = rows * m + couplings.keys
    bias = jnp.broadcast_to(inputs.bias, (*index.shape[:-2], n, m))
    entries = jnp.take_along_axis(bias.reshape(*bias.shape[:-2], 1, n * m), index, -1)
    # Padding may have a bias of -inf.
    shares = couplings.shares
    score = score + (jnp.where(shares > 0, entries, 0.0) * shares).sum(-1)
  return -per_query(inputs, score)
