"""Attention by sliced transport plans without regularisation: min-SWGG and EST.

Along each slice the optimal coupling of the projected queries and keys is found by
sorting and lifted to the tokens themselves. min-SWGG keeps the slice whose coupling
costs least (Mahey et al., 2023, "Fast Optimal Transport through Sliced Generalized
Wasserstein Geodesics", arXiv 2307.01770); the expected sliced transport plan averages
over slices, weighted by exp(-t cost) (Liu et al., 2025, "Expected Sliced Transport
Plans", arXiv 2410.12176). The cost is that of attention, minus the logits, which for
plans of these marginals ranks slices as the papers' squared distance of scaled tokens
does.

Rows and columns are exact, for any number of queries and keys and any padding, and no
n x m matrix is formed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import Call, attention_fn
from asap_jax.masses import valid
from asap_jax.peers.coupling import Couplings, couple

Directions = Float[Array, "heads slices dim"]


@attention_fn
def swgg_attention(call: Call, *, directions: Directions | None = None) -> Array:
  """The coupling of the slice with the greatest mean logit (min-SWGG).

  A permutation where there are as many queries as keys. Works under jit, vmap and grad;
  the plan is piecewise constant, so queries, keys, bias and directions get gradients of
  zero and only the values learn.

  Args:
    call: all arguments of `asap_jax.softmax_attention`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    directions: slices per head, `[heads, slices, dim]`; coordinate axes by default.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `directions` do not fit.
  """
  couplings = _couplings(call.inputs, directions)
  best = jnp.argmin(mean_costs(call.inputs, couplings), axis=-1)
  return call.attend(couplings.choose(best))


@attention_fn
def est_attention(
  call: Call,
  *,
  directions: Directions | None = None,
  inverse_temperature: float | Array = 0.0,
) -> Array:
  """The mean of all slices' couplings, each weighted by exp(-t cost) (EST).

  Works under jit, vmap and grad. Couplings are piecewise constant: queries, keys and
  bias get gradients through the weights of the slices alone (none if t is zero),
  directions none.

  Args:
    call: all arguments of `asap_jax.softmax_attention`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    directions: slices per head, `[heads, slices, dim]`; coordinate axes by default.
    inverse_temperature: t; the cost is minus the mean logit of the coupling. At zero
      all slices weigh the same, towards infinity it is `swgg_attention`.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `directions` do not fit.
  """
  couplings = _couplings(call.inputs, directions)
  costs = mean_costs(call.inputs, couplings)
  weights = jax.nn.softmax(-inverse_temperature * costs, axis=-1)
  return call.attend(couplings.weighted(weights))


def _couplings(inputs: Inputs, directions: Directions | None) -> Couplings:
  masks = inputs.query_mask, inputs.key_mask
  return couple(inputs.query, inputs.key, directions, *masks)


def mean_costs(
  inputs: Inputs, couplings: Couplings
) -> Float[Array, "*batch heads slices"]:
  """Minus the logit of each coupling, mean over the valid queries."""
  moved = couplings.moved(inputs.key)
  if couplings.queries is None:
    score = jnp.einsum("...nd,...lnd->...l", inputs.query, moved)
  else:
    # By entry, so that no query has to be summed up first.
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
  mask = valid(inputs.query_mask)
  count = inputs.query.shape[-2] if mask is None else mask.sum(-1, keepdims=True)
  return -score / jnp.maximum(count, 1)
