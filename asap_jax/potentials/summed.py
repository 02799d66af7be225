"""Sliced potentials as a dual of the whole problem, with nothing learned.

Where U, V are bases with U^T V = I, the product <x, y> = sum_l (Ux)_l (Vy)_l is a sum
over slices, so their one-dimensional potentials for the cost -xy, added up, are
feasible for the cost -<x, y>. The canonical bases U = Q^T Sx^(-1/2), V = Q^T Sx^(1/2),
with Sx, Sy the covariances and Q the eigenvectors of Sx^(1/2) Sy Sx^(1/2), make both
clouds uncorrelated: the sum is then optimal for any two Gaussians, and goes beyond
their quadratic potentials where the marginals do. Entropy flattens a dual: that of two
Gaussians on the line of deviations s and t is rho times the unregularised one, about
their means, with rho = sqrt(1 + k^2) - k and k = epsilon / (2 s t) (it follows from
Janati et al., 2020, "Entropic Optimal Transport between Unbalanced Gaussian Measures
has a Closed Form"), so every slice is shrunk by its rho. The bases are our choice.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.masses import Weights, centre, check_weights, masses, mean, zero_invalid
from asap_jax.potentials.kantorovich import kantorovich_potentials

Slicing = Literal["canonical", "principal"]
# Bounds the condition of a basis where a cloud spans no volume.
_EIGENVALUE_FLOOR = 1e-6


class PairedBases(NamedTuple):
  """Paired bases: <x, y> = sum_l <query_l, x> <key_l, y>.

  Attributes:
    query: of the queries, `[..., slices, dim]`.
    key: of the keys, likewise.
  """

  query: Float[Array, "... slices dim"]
  key: Float[Array, "... slices dim"]


def paired_bases(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  kind: Slicing = "canonical",
) -> PairedBases:
  """Bases of `dim` slices in which both clouds are uncorrelated, or nearly.

  Works under jit and vmap; for grad they are constants, since the start is feasible
  whatever they are.

  Args:
    query: `[..., n, dim]`.
    key: `[..., m, dim]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.
    kind: `"canonical"` (module docstring), or `"principal"`: the eigenvectors of both
      covariances, each of trace one, added up.

  Returns:
    `PairedBases`, dim of them.

  Raises:
    ValueError: if weights do not fit, or `kind` is unknown.
  """
  _check(query, key, query_weights, key_weights)
  if kind not in ("canonical", "principal"):
    raise ValueError(f"kind={kind!r}: expected 'canonical' or 'principal'")
  of_query = _covariance(query, query_weights)
  of_key = _covariance(key, key_weights)
  if kind == "principal":
    both = sum(
      s / _positive(jnp.trace(s, axis1=-2, axis2=-1)) for s in (of_query, of_key)
    )
    basis = jnp.swapaxes(jnp.linalg.eigh(both)[1], -1, -2)
    return PairedBases(basis, basis)
  values, vectors = jnp.linalg.eigh(of_query)
  values = jnp.maximum(values, _EIGENVALUE_FLOOR * _positive(values[..., -1])[..., 0])
  deviations = jnp.sqrt(values)[..., None, :]
  root = _matmul(vectors * deviations, jnp.swapaxes(vectors, -1, -2))
  inverse = _matmul(vectors / deviations, jnp.swapaxes(vectors, -1, -2))
  middle = _matmul(_matmul(root, of_key), root)
  axes = jnp.swapaxes(jnp.linalg.eigh(middle)[1], -1, -2)
  return PairedBases(_matmul(axes, inverse), _matmul(axes, root))


def sliced_start(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  slices: Slicing | Float[Array, "*#batch slices dim"] = "canonical",
  entropic: bool = True,
) -> Float[Array, "*batch n"]:
  """A query-side dual for the logits query key^T, in their units, nothing learned.

  f_i = -<q_i, mean k> + w sum_l rho_l phi_l(i), with phi the one-dimensional potentials
  of the centred clouds along the slices (module docstring), centred. It leaves out the
  logarithm of the masses, which `asap_jax.Duals` contain.

  Works under jit, vmap and grad; bases that depend on the points are constants there.

  Args:
    query: `[..., n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., m, dim]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.
    slices: `"canonical"` or `"principal"`, w = 1; or unit directions
      `[..., slices, dim]`, w = dim / slices: the average over the sphere for random
      ones, exact for whole orthogonal bases.
    entropic: whether to shrink by rho; else rho = 1, the limit of large logits.

  Returns:
    f, `[..., n]`, zero on absent points.

  Raises:
    ValueError: if dimensions or weights do not fit, or `slices` is unknown.
  """
  _check(query, key, query_weights, key_weights)
  dtype = jnp.promote_types(jnp.promote_types(query.dtype, key.dtype), jnp.float32)
  query = zero_invalid(query.astype(dtype), query_weights, axis=-2)
  key = zero_invalid(key.astype(dtype), key_weights, axis=-2)
  if isinstance(slices, str):
    weights = query_weights, key_weights
    bases, share = paired_bases(query, key, *weights, kind=slices), 1.0
  elif slices.ndim < 2 or slices.shape[-1] != query.shape[-1]:
    raise ValueError(
      f"slices has shape {slices.shape}: expected [..., slices, {query.shape[-1]}]"
    )
  else:
    bases = PairedBases(slices.astype(dtype), slices.astype(dtype))
    share = slices.shape[-1] / slices.shape[-2]
  x = _projected(centre(query, query_weights, axis=-2), bases.query)
  y = _projected(centre(key, key_weights, axis=-2), bases.key)
  by_slice = [w if w is None else w[..., None, :] for w in (query_weights, key_weights)]
  phi = kantorovich_potentials(x, y, *by_slice).phi
  if entropic:
    spread = mean(x**2, by_slice[0]) * mean(y**2, by_slice[1])
    # rho = 1 / (k + sqrt(1 + k^2)) times 2 s t above and below: no slice divides by 0.
    product = 2.0 * jnp.sqrt(jnp.where(spread > 0, spread, 1.0))
    rho = product / (1.0 + jnp.sqrt(1.0 + product**2))
    phi = jnp.where(spread > 0, rho, 0.0) * phi
  average = mean(key, key_weights, axis=-2)
  f = share * phi.sum(-2) - _projected(query, average)[..., 0, :]
  return centre(f, query_weights)


def _check(
  query: Array, key: Array, query_weights: Weights, key_weights: Weights
) -> None:
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(
      f"query {query.shape} and key {key.shape}: expected the same last dimension"
    )
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])


def _covariance(points: Array, weights: Weights) -> Array:
  """`[..., dim, dim]`, a constant for differentiation, as eigenvectors may be many."""
  points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
  points = zero_invalid(jax.lax.stop_gradient(points), weights, axis=-2)
  centred = centre(points, weights, axis=-2)
  mass = masses(weights, points.shape[-2])[..., :, None]
  return _matmul(jnp.swapaxes(centred * mass, -1, -2), centred)


def _positive(value: Array) -> Array:
  """`value[..., None, None]`, or one where it is zero."""
  return jnp.where(value > 0, value, 1.0)[..., None, None]


def _projected(points: Array, basis: Array) -> Array:
  """`[..., slices, n]`."""
  return _matmul(basis, jnp.swapaxes(points, -1, -2))


def _matmul(a: Array, b: Array) -> Array:
  # A GPU's TF32 is too coarse for what is sorted or inverted.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
