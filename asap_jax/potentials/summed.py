r"""Sliced potentials as a dual of the whole problem, with nothing learned.

Where U, V are bases with $U^T V = I$, the product
$\langle x, y \rangle = \sum_l (Ux)_l (Vy)_l$ is a sum over slices, so their
one-dimensional potentials for the cost $-xy$, added up, are feasible for the cost
$-\langle x, y \rangle$. The canonical bases are $U = Q^T S_x^{-1/2}$ and
$V = Q^T S_x^{1/2}$, with covariances $S_x$, $S_y$ and Q the eigenvectors of
$S_x^{1/2} S_y S_x^{1/2}$. They make both clouds uncorrelated: the sum is then optimal
for any two Gaussians, and follows the marginals where they are not Gaussian.

Entropy flattens a dual. For two Gaussians on the line of deviations s and t it is
$\rho$ times the unregularised one, about their means, with
$\rho = \sqrt{1 + k^2} - k$ and $k = \epsilon / (2 s t)$ (it follows from Janati et al.,
2020, "Entropic Optimal Transport between Unbalanced Gaussian Measures has a Closed
Form"), so every slice is shrunk by its $\rho$. The bases are our choice.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax import masses
from asap_jax.masses import Masses, centre, check_clouds, zero_invalid
from asap_jax.numerics import exact_einsum, float_dtype
from asap_jax.potentials.kantorovich import kantorovich_potentials

Slicing = Literal["canonical", "principal"]
# Bounds the condition of a basis where a cloud spans no volume.
_EIGENVALUE_FLOOR = 1e-6


class PairedBases(NamedTuple):
  """Paired bases U and V of queries and keys, with $U^T V = I$.

  Attributes:
    query: U, of the queries, `[..., slices, dim]`.
    key: V, of the keys, `[..., slices, dim]`.
  """

  query: Float[Array, "... slices dim"]
  key: Float[Array, "... slices dim"]


def check_slicing(name: str, kind: str) -> None:
  """Raises ValueError unless slices of this kind are known."""
  if kind not in get_args(Slicing):
    raise ValueError(f"{name}={kind!r}: expected one of {get_args(Slicing)}")


def paired_bases(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
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
    key_weights: masses of the keys, `[..., m]`.
    kind: `"canonical"` (module docstring), or `"principal"`: the eigenvectors of both
      covariances, each of trace one, added up.

  Returns:
    `PairedBases`, dim of them.

  Raises:
    ValueError: if weights do not fit, or `kind` is unknown.
  """
  check_clouds(query, key, query_weights, key_weights)
  check_slicing("kind", kind)
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
  product = "...ij,...jk->...ik"
  back = jnp.swapaxes(vectors, -1, -2)
  root = exact_einsum(product, vectors * deviations, back)
  inverse = exact_einsum(product, vectors / deviations, back)
  middle = exact_einsum("...ij,...jk,...kl->...il", root, of_key, root)
  axes = jnp.swapaxes(jnp.linalg.eigh(middle)[1], -1, -2)
  return PairedBases(
    exact_einsum(product, axes, inverse), exact_einsum(product, axes, root)
  )


def sliced_start(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  slices: Slicing | Float[Array, "*#batch slices dim"] = "canonical",
  entropic: bool = True,
) -> Float[Array, "*batch n"]:
  r"""Query-side dual for the logits query key^T, in their units, nothing learned.

  $f_i = -\langle q_i, \bar k \rangle + w \sum_l \rho_l \phi_l(i)$, with $\phi_l$ the
  one-dimensional potentials of the centred clouds along the slices (module docstring),
  centred. It leaves out the logarithm of the masses, which `asap_jax.Duals` contain.

  Works under jit, vmap and grad; bases that depend on the points are constants there.

  Args:
    query: `[..., n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., m, dim]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: masses of the keys, `[..., m]`.
    slices: `"canonical"` or `"principal"`, w = 1; or unit directions
      `[..., slices, dim]`, w = dim / slices: the average over the sphere for random
      ones, exact for whole orthogonal bases.
    entropic: whether to shrink by rho; else rho = 1, the limit of large logits.

  Returns:
    f, `[..., n]`, zero on absent points.

  Raises:
    ValueError: if dimensions or weights do not fit, or `slices` is unknown.
  """
  check_clouds(query, key, query_weights, key_weights)
  dtype = float_dtype(query, key)
  query = zero_invalid(query.astype(dtype), query_weights, axis=-2)
  key = zero_invalid(key.astype(dtype), key_weights, axis=-2)
  if isinstance(slices, str):
    bases = paired_bases(query, key, query_weights, key_weights, kind=slices)
    share = 1.0
  elif slices.ndim < 2 or slices.shape[-1] != query.shape[-1]:
    raise ValueError(
      f"slices has shape {slices.shape}: expected [..., slices, {query.shape[-1]}]"
    )
  else:
    bases = PairedBases(slices.astype(dtype), slices.astype(dtype))
    share = slices.shape[-1] / slices.shape[-2]
  x = _projected(centre(query, query_weights, axis=-2), bases.query)
  y = _projected(centre(key, key_weights, axis=-2), bases.key)
  weights = masses.by_slice(query_weights, key_weights)
  phi = kantorovich_potentials(x, y, *weights).phi
  if entropic:
    spread = masses.mean(x**2, weights[0]) * masses.mean(y**2, weights[1])
    # rho = 1 / (k + sqrt(1 + k^2)) times 2 s t above and below: no slice divides by 0.
    product = 2.0 * jnp.sqrt(jnp.where(spread > 0, spread, 1.0))
    rho = product / (1.0 + jnp.sqrt(1.0 + product**2))
    phi = jnp.where(spread > 0, rho, 0.0) * phi
  average = masses.mean(key, key_weights, axis=-2)
  f = share * phi.sum(-2) - _projected(query, average)[..., 0, :]
  return centre(f, query_weights)


def _covariance(points: Array, weights: Masses) -> Array:
  """Covariance `[..., dim, dim]`, without gradient.

  That of eigenvectors is infinite where eigenvalues coincide.
  """
  points = jax.lax.stop_gradient(points.astype(float_dtype(points)))
  points = zero_invalid(points, weights, axis=-2)
  centred = centre(points, weights, axis=-2)
  mass = masses.normalised(weights, points.shape[-2])[..., :, None]
  return exact_einsum("...ni,...nj->...ij", centred * mass, centred)


def _positive(value: Array) -> Array:
  """`value[..., None, None]`, or one where it is zero."""
  return jnp.where(value > 0, value, 1.0)[..., None, None]


def _projected(points: Array, basis: Array) -> Array:
  """Coordinates of points along a basis, `[..., slices, n]`."""
  return exact_einsum("...ld,...nd->...ln", basis, points)
