r"""Features of one sequence from which its Sinkhorn query-side dual is predicted.

Every feature is centred over the valid queries of its sequence, since a dual is defined
up to a constant. Kinds, in this order:

- `potentials`: exact one-dimensional potentials along the slices (Tran, Milkert and
  Hyde, 2026, "ASAP", arXiv 2605.12879);
- `query`: the query itself, beyond the paper;
- `cumulants`: $\langle q_i, \bar k \rangle$ and $q_i^T \mathrm{Cov}(k) q_i$, the first
  two cumulants of $\log \mathrm{mean}_j \exp S_{ij}$, beyond the paper;
- `transport`: along each slice the place $Q_y(u_i)$ that the query is sent to, and its
  product with the projected query: free from the sort, beyond the paper;
- `gaussian_diagonal`: for each coordinate the square of the centred query times its
  entropic Gaussian coefficient, $(q_{ij} - \bar q_j)^2 v_j$, beyond the paper;
- `gaussian`: the square form of the entropic Gaussian potential with covariances of low
  rank (`asap_jax.potentials.gaussian_potential`), one column, beyond the paper.

Queries here already carry the scale of the logits: $S = Q K^T$.
"""

import functools
import itertools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.masses import (
  Masses,
  centre,
  check_weights,
  mean,
  normalised,
  zero_invalid,
)
from asap_jax.numerics import exact_einsum, float_dtype, for_each, narrow_einsum
from asap_jax.potentials.directions import normalise
from asap_jax.potentials.gaussian import (
  clouds_of,
  diagonal_squares,
  low_rank_form,
)
from asap_jax.potentials.kantorovich import sliced_potentials
from asap_jax.sizes import at_most

KINDS = (
  "potentials",
  "query",
  "cumulants",
  "transport",
  "gaussian_diagonal",
  "gaussian",
)
FEATURES = KINDS[:3]
# Of `asap_jax.compile` by default. Beside slices the Gaussian kinds take more time than
# they gain: on a teacher of sharp images TV .272 instead of .277 for 19 % of it.
COMPILED = KINDS[:4]


def feature_count(features: tuple[str, ...], slices: int, dim: int) -> int:
  """Number of columns that the feature kinds have together.

  Raises:
    ValueError: if a kind is unknown, repeated or out of order.
  """
  if not features or tuple(kind for kind in KINDS if kind in features) != features:
    raise ValueError(f"features={features}: expected some of {KINDS}, in that order")
  sizes = _sizes(slices, dim)
  return sum(sizes[kind] for kind in features)


def split_columns(
  columns: Float[Array, "*batch features"],
  features: tuple[str, ...],
  slices: int,
  dim: int,
) -> dict[str, Float[Array, "*batch columns"]]:
  """The columns of each kind of features."""
  sizes = _sizes(slices, dim)
  ends = list(itertools.accumulate(sizes[kind] for kind in features))
  parts = jnp.split(columns, ends[:-1], axis=-1)
  return dict(zip(features, parts, strict=True))


def _sizes(slices: int, dim: int) -> dict[str, int]:
  return {
    "potentials": slices,
    "query": dim,
    "cumulants": 2,
    "transport": 2 * slices,
    "gaussian_diagonal": dim,
    "gaussian": 1,
  }


def dual_features(
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  directions: Float[Array, "heads slices dim"],
  features: tuple[str, ...] = FEATURES,
  query_weights: Masses = None,
  key_weights: Masses = None,
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
  """Features of a sequence in parts, before they are centred.

  Neither joining them nor centring costs a pass over all of them that way, and what XLA
  can fuse with the attention stays apart.

  Attributes:
    parts: `[..., heads, n, columns]` each, zero at absent queries.
    weights: of the queries.
  """

  parts: tuple[Array, ...]
  weights: Masses

  @property
  def columns(self) -> Float[Array, "*batch heads n features"]:
    """All features side by side, centred."""
    return jnp.concatenate(
      [centre(part, self.weights, axis=-2) for part in self.parts], axis=-1
    )

  def times(
    self, kernel: Float[Array, "*#batch heads features width"]
  ) -> Float[Array, "*batch heads n width"]:
    """The features times a kernel, not centred."""
    products, first = [], 0
    for part in self.parts:
      last = first + part.shape[-1]
      products.append(times(part, kernel[..., first:last, :]))
      first = last
    return functools.reduce(operator.add, products)

  def variances(self) -> Float[Array, "*batch heads features"]:
    """Of each feature over the valid queries."""
    squares = [centre(part, self.weights, axis=-2) ** 2 for part in self.parts]
    found = [mean(square, self.weights, axis=-2) for square in squares]
    return jnp.concatenate(found, axis=-1)[..., 0, :]


def features_of(
  query: Array,
  key: Array,
  directions: Array,
  features: tuple[str, ...],
  query_weights: Masses = None,
  key_weights: Masses = None,
  products: Array | None = None,
) -> Features:
  """`dual_features` in parts; `products` is query key^T, where it is at hand."""
  feature_count(features, *directions.shape[-2:])
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])
  dtype = float_dtype(query, key)
  query = zero_invalid(query.astype(dtype), query_weights, axis=-2)
  key = zero_invalid(key.astype(dtype), key_weights, axis=-2)
  parts: dict[str, list[Array]] = {"query": [query]}
  if "potentials" in features or "transport" in features:
    sliced, projected = sliced_potentials(
      query, key, normalise(directions.astype(dtype)), query_weights, key_weights
    )
    phi, moved, x = (
      jnp.swapaxes(a, -1, -2) for a in (sliced.phi, sliced.transport, projected)
    )
    parts |= {"potentials": [phi], "transport": [moved, moved * x]}
  if "cumulants" in features:
    both = _cumulants(query, key, key_weights, products)
    parts["cumulants"] = [zero_invalid(a, query_weights, axis=-2) for a in both]
  if "gaussian_diagonal" in features or "gaussian" in features:
    clouds = clouds_of(query, key, query_weights, key_weights)
    forms = {
      "gaussian_diagonal": diagonal_squares,
      "gaussian": lambda clouds: low_rank_form(clouds)[..., None],
    }
    parts |= {
      kind: [zero_invalid(form(clouds), query_weights, axis=-2)]
      for kind, form in forms.items()
      if kind in features
    }
  return Features(
    tuple(part for kind in features for part in parts[kind]), query_weights
  )


def times(inputs: Array, kernel: Array) -> Array:
  """inputs kernel, `[..., n, width]`, of inputs `[..., n, inputs]`."""
  if kernel.shape[-2] == 1:  # no product of matrices: XLA fuses it with anything
    return inputs * kernel
  kernel = for_each(inputs.shape[:-2], kernel)
  return exact_einsum("...np,...pw->...nw", inputs, kernel)


def _cumulants(
  query: Array, key: Array, key_weights: Masses, products: Array | None
) -> list[Array]:
  """Both cumulants, `[..., n, 1]` each; from query key^T where it is at hand."""
  if products is not None:
    by_key = None if key_weights is None else key_weights[..., None, :]
    first = mean(products, by_key)
    return [first, mean((products - first) ** 2, by_key)]
  mass = normalised(key_weights, key.shape[-2])
  first = narrow_einsum("...nd,...md->...nm", query, mean(key, key_weights, axis=-2))
  centred = centre(key, key_weights, axis=-2)
  if at_most(key.shape[-2], 2 * key.shape[-1]):
    # Few keys need no covariance. With roots of the masses nothing stands between the
    # product and its squares: at 128 tokens on a CPU the operator takes 8 % less.
    deviations = centred * jnp.sqrt(mass)[..., None]
    moved = exact_einsum("...nd,...md->...nm", query, deviations)
    return [first, jnp.sum(moved * moved, axis=-1, keepdims=True)]
  return [first, spread(query, key, key_weights)[..., None]]


def spread(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  key_weights: Masses = None,
) -> Float[Array, "*batch n"]:
  """Variance over keys of each query's products, by the covariance of the keys."""
  mass = normalised(key_weights, key.shape[-2])
  centred = centre(key, key_weights, axis=-2)
  covariance = exact_einsum("...md,...me->...de", centred * mass[..., None], centred)
  moved = exact_einsum("...nd,...de->...ne", query, covariance)
  return jnp.sum(moved * query, axis=-1)
