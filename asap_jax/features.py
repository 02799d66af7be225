"""Features of one sequence from which its Sinkhorn query-side dual is predicted.

Every feature is centred over the valid queries of its sequence, since a dual is defined
up to a constant. Kinds, in this order:

- `potentials`: exact one-dimensional potentials along the slices (Tran, Milkert and
  Hyde, 2026, "ASAP", arXiv 2605.12879);
- `query`: the query itself, beyond the paper;
- `cumulants`: <q_i, mean k> and q_i^T Cov(k) q_i, the first two cumulants of
  log mean_j exp(S_ij), beyond the paper;
- `transport`: along each slice where the query is sent, Q_y(u_i), and its product with
  the projected query: free from the sort, beyond the paper.

Queries here already carry the scale of the logits: S = query key^T.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.potentials import sliced_potentials
from asap_jax.slices import normalise
from asap_jax.weights import Weights, centre, check_weights, masses, mean, zero_invalid

KINDS = ("potentials", "query", "cumulants", "transport")
FEATURES = KINDS[:3]


def feature_count(features: tuple[str, ...], slices: int, dim: int) -> int:
  """Number of columns that the feature kinds have together.

  Raises:
    ValueError: if a kind is unknown, repeated or out of order.
  """
  if not features or tuple(kind for kind in KINDS if kind in features) != features:
    raise ValueError(f"features={features}: expected some of {KINDS}, in that order")
  sizes = {"potentials": slices, "query": dim, "cumulants": 2, "transport": 2 * slices}
  return sum(sizes[kind] for kind in features)


def dual_features(
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  directions: Float[Array, "heads slices dim"],
  features: tuple[str, ...] = FEATURES,
  query_weights: Weights = None,
  key_weights: Weights = None,
) -> Float[Array, "*batch heads n features"]:
  """Features of each query, centred over the valid queries, zero at the others.

  Works under jit, vmap and grad, through the sort and in the directions too.

  Args:
    query: `[..., heads, n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., heads, m, dim]`.
    directions: slices per head, normalised here.
    features: kinds of features (module docstring).
    query_weights: `None`, mask or masses, `[..., heads or 1, n]`.
    key_weights: likewise, `[..., heads or 1, m]`.

  Returns:
    Features, float32 or better.

  Raises:
    ValueError: if weights do not fit or `features` is not understood.
  """
  return features_of(
    query, key, directions, features, query_weights, key_weights
  ).columns


class Features(NamedTuple):
  """Features of a sequence in the layouts that cost no transposition.

  Attributes:
    rows: all but the query, `[..., heads, rows, n]`.
    query: `[..., heads, n, dim]`, or `None` if it is no feature.
    first: how many of the rows come before the query.
    weights: of the queries.
  """

  rows: Array
  query: Array | None
  first: int
  weights: Weights

  @property
  def columns(self) -> Float[Array, "*batch heads n features"]:
    """All features side by side."""
    rows = jnp.swapaxes(self.rows, -1, -2)
    if self.query is None:
      return rows
    before, after = rows[..., : self.first], rows[..., self.first :]
    return jnp.concatenate([before, self.query, after], axis=-1)

  def times(
    self, kernel: Float[Array, "*#batch heads features width"]
  ) -> Float[Array, "*batch heads width n"]:
    """The columns times a kernel, with the queries last."""
    if self.query is None:
      return times(kernel, self.rows)
    last = self.first + self.query.shape[-1]
    of_rows = jnp.concatenate(
      [kernel[..., : self.first, :], kernel[..., last:, :]], axis=-2
    )
    of_query = kernel[..., self.first : last, :]
    product = times(of_query, jnp.swapaxes(self.query, -1, -2))
    return product + times(of_rows, self.rows) if self.rows.shape[-2] else product

  def variances(self) -> Float[Array, "*batch heads features"]:
    """Of each feature over the valid queries."""
    mass = masses(self.weights, self.rows.shape[-1])
    rows = einsum("...pn,...pn->...p", self.rows * mass[..., None, :], self.rows)
    if self.query is None:
      return rows
    query = self.query
    query = einsum("...nd,...nd->...d", query * mass[..., None], query)
    return jnp.concatenate(
      [rows[..., : self.first], query, rows[..., self.first :]], axis=-1
    )


def features_of(
  query: Array,
  key: Array,
  directions: Array,
  features: tuple[str, ...],
  query_weights: Weights = None,
  key_weights: Weights = None,
  products: Array | None = None,
) -> Features:
  """`dual_features` in parts; `products` is query key^T, where it is at hand."""
  feature_count(features, *directions.shape[-2:])
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])
  dtype = jnp.promote_types(jnp.promote_types(query.dtype, key.dtype), jnp.float32)
  query = zero_invalid(query.astype(dtype), query_weights, axis=-2)
  key = zero_invalid(key.astype(dtype), key_weights, axis=-2)
  rows = [jnp.zeros((*query.shape[:-2], 0, query.shape[-2]), dtype)]
  if "potentials" in features or "transport" in features:
    sliced, projected = sliced_potentials(
      query, key, normalise(directions.astype(dtype)), query_weights, key_weights
    )
  if "potentials" in features:
    rows.append(sliced.phi)
  if "cumulants" in features:
    rows.append(_cumulants(query, key, key_weights, products))
  if "transport" in features:
    rows.extend([sliced.transport, sliced.transport * projected])
  by_row = None if query_weights is None else query_weights[..., None, :]
  return Features(
    centre(jnp.concatenate(rows, axis=-2), by_row),
    centre(query, query_weights, axis=-2) if "query" in features else None,
    directions.shape[-2] if "potentials" in features else 0,
    query_weights,
  )


def einsum(subscripts: str, *operands: Array) -> Array:
  """`jnp.einsum` in full: duals reach hundreds, where TF32 is off by a tenth."""
  return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def times(kernel: Array, inputs: Array) -> Array:
  """kernel^T inputs, `[..., width, n]`, of inputs `[..., inputs, n]`."""
  # A kernel for all of the batch: with one for a head, XLA would transpose the inputs.
  kernel = jnp.broadcast_to(kernel, (*inputs.shape[:-2], *kernel.shape[-2:]))
  return einsum("...pw,...pn->...wn", kernel, inputs)


def _cumulants(
  query: Array, key: Array, key_weights: Weights, products: Array | None
) -> Array:
  """Both cumulants, `[..., 2, n]`."""
  size, dim = key.shape[-2:]
  mass = masses(key_weights, size)
  if products is not None:
    first = einsum("...nm,...m->...n", products, mass)
    deviation = products - first[..., None]
    return jnp.stack([first, _inner(deviation, deviation, mass)], axis=-2)
  average = mean(key, key_weights, axis=-2)[..., 0, :]
  first = einsum("...nd,...d->...n", query, average)
  centred = centre(key, key_weights, axis=-2)
  if size > 2 * dim:  # fewer products, in one pass more
    weighted = centred * mass[..., None]
    covariance = einsum("...md,...me->...de", weighted, centred)
    moved = einsum("...nd,...de->...ne", query, covariance)
    second = _inner(moved, query, jnp.ones(dim, query.dtype))
    return jnp.stack([first, second], axis=-2)
  # Roots of the masses at the keys: nothing stands between the product and its squares,
  # and XLA keeps it in registers on a CPU.
  scaled = centred * jnp.sqrt(mass)[..., None]
  deviation = einsum("...nd,...md->...nm", query, scaled)
  return jnp.stack([first, jnp.sum(deviation * deviation, axis=-1)], axis=-2)


def _inner(a: Array, b: Array, mass: Array) -> Array:
  """Inner products along the last axis, as a product that XLA does well on a CPU.

  Reductions of many short rows, fused with what comes before, take it ten times longer.
  """
  product = jax.lax.optimization_barrier(a * b)
  return einsum("...nd,...d->...n", product, mass)
