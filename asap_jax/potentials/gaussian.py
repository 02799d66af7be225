r"""Entropic potentials of Gaussians in closed form: a start that nothing has to learn.

Queries x have mean a and covariance A, keys y mean b and covariance B, and the logits
are $S = x^T y$. Between Gaussians of these moments the entropic problem has the
query-side potential

$$f(x) = -x^T b - \tfrac12 (x - a)^T V (x - a), \qquad
V = B \left(\tfrac12 I + (A B + \tfrac14 I)^{1/2}\right)^{-1}$$

(Janati et al., 2020, "Entropic Optimal Transport between Unbalanced Gaussian Measures
has a Closed Form", arXiv 2006.02572, theorem 1, written for this cost; derivation in
docs/gaussian_start.md). On one coordinate it is the potential of one slice, entropic
and without a sort. V = B would be the second cumulant, what half an iteration from zero
gives: it overshoots where logits are sharp.

Everything is products of matrices and sums over tokens: no factorisation of LAPACK, no
gather, and nothing that crosses batch or heads, so that it runs alike on a CPU, GPU or
TPU and under a sharded batch.
"""

import functools
import operator
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from asap_jax.masses import (
  Masses,
  Side,
  check_clouds,
  normalised,
  zero_invalid,
)
from asap_jax.numerics import (
  exact_einsum,
  float_dtype,
  for_each,
  narrow_einsum,
  repeated,
)
from asap_jax.platforms import by_platform

Covariances = Literal["diagonal", "low_rank", "full"]
RANK = 4

# Share of its trace by which a product of covariances is made positive: float32 rounds
# its small eigenvalues by about as much.
_FLOOR = 1e-6
# Where its entries exceed the trace, as if 1 / 4 were at least this share of that.
_SKEW = 3e-3
# Steps that bring eigenvalues a million times apart to their square root.
_ROOT_STEPS = 10
_INVERSE_STEPS = 3
# Share of a squared norm below which a direction is one of those before it, rounded.
_DEPENDENT = 1e-10


def gaussian_potential(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  covariances: Covariances = "low_rank",
  rank: int = RANK,
  side: Side = "query",
) -> Float[Array, "*batch points"]:
  """The entropic potential of Gaussians with the moments of queries and keys.

  Exact in the limit of many Gaussian points, a start for Sinkhorn's iterations for all
  others (`asap_jax.sinkhorn_attention`). It stands for the *converged* plan. Masses
  count in the moments; the logarithm of masses that `asap_jax.Duals` contain is left
  out. Works under jit, vmap and grad, with gradients that are finite whatever the
  points; deterministic.

  Args:
    query: `[..., n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., m, dim]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: masses of the keys, `[..., m]`.
    covariances: what of A and B is used. `"diagonal"`: each coordinate by itself.
      `"low_rank"`: all of them on the `rank` directions that matter most for the
      logits, and each coordinate by itself in what is left. `"full"`: everything, for
      dim^3 operations.
    rank: directions of `"low_rank"`, capped at dim.
    side: whose potential, `"query"` (f) or `"key"` (g).

  Returns:
    The potential in units of logits, `[..., n]` or `[..., m]`, float32 or better, zero
    at absent points; up to a constant for each sequence.

  Raises:
    ValueError: if dimensions or weights do not fit, `rank` is below one, or a name is
      unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> tokens = jnp.array([[3.0, 0.0], [-3.0, 0.0]])
    >>> f = gaussian_potential(tokens, tokens, covariances="diagonal")
    >>> f"{f[0]:.2f} and {f[1]:.2f}"
    '-4.26 and -4.26'
  """
  check_clouds(query, key, query_weights, key_weights)
  check_covariances(covariances, rank)
  if side not in get_args(Side):
    raise ValueError(f"side={side!r}: expected one of {get_args(Side)}")
  if side == "key":
    query, key, query_weights, key_weights = key, query, key_weights, query_weights
  clouds = clouds_of(query, key, query_weights, key_weights)
  x = clouds.x - clouds.mean_x
  inside = jnp.zeros(())
  if covariances == "diagonal":
    moved = diagonal_form(clouds) * x
  elif covariances == "full":
    moved = exact_einsum("...nd,...de->...ne", x, _full(clouds))
  else:
    diagonal, inside = _low_rank(clouds, rank)
    moved = diagonal * x
  # The mean query's share is left out: a constant, which may be large.
  f = -row_sums_of(x * (clouds.mean_y + 0.5 * moved)) - 0.5 * inside
  return zero_invalid(f, clouds.x_weights)


def check_covariances(covariances: str, rank: int) -> None:
  """Raises ValueError unless these are covariances, and a rank of some."""
  if covariances not in get_args(Covariances):
    raise ValueError(
      f"covariances={covariances!r}: expected one of {get_args(Covariances)}"
    )
  if rank < 1:
    raise ValueError(f"rank={rank}: expected at least one direction")


class Clouds(NamedTuple):
  """Points of the side whose potential it is, x, and of the other, y, with means.

  Attributes:
    x: `[..., n, dim]`, float32 or better, zero at absent points.
    y: `[..., m, dim]`, likewise.
    mean_x: `[..., 1, dim]`.
    mean_y: likewise.
    x_weights: masses.
    y_weights: masses.
  """

  x: Array
  y: Array
  mean_x: Array
  mean_y: Array
  x_weights: Masses
  y_weights: Masses


def clouds_of(
  x: Array, y: Array, x_weights: Masses = None, y_weights: Masses = None
) -> Clouds:
  """Both sides' points, whatever absent points hold, and means."""
  dtype = float_dtype(x, y)
  x = zero_invalid(x.astype(dtype), x_weights, axis=-2)
  y = zero_invalid(y.astype(dtype), y_weights, axis=-2)
  means = _mean(x, x_weights), _mean(y, y_weights)
  return Clouds(x, y, *means, x_weights, y_weights)


def diagonal_squares(clouds: Clouds) -> Float[Array, "*batch n dim"]:
  """v_j (x_j - a_j)^2 with each coordinate's own v_j, anything at absent points."""
  return diagonal_form(clouds) * (clouds.x - clouds.mean_x) ** 2


def low_rank_form(clouds: Clouds, rank: int = RANK) -> Float[Array, "*batch n"]:
  """(x - a)^T V (x - a), exact along few directions, anything at absent points."""
  diagonal, inside = _low_rank(clouds, rank)
  return row_sums_of(diagonal * (clouds.x - clouds.mean_x) ** 2) + inside


def _low_rank(clouds: Clouds, rank: int) -> tuple[Array, Array]:
  """V is a diagonal one, D, corrected on the directions that count most.

  With an orthonormal basis Q of them, V = D + Q (V_Q - Q^T D Q) Q^T: on Q it is V_Q, of
  the covariances there. D sees of y what is left without Q, and V is exact where that
  is nothing.

  Returns:
    D, `[..., 1, dim]`, and the correction's share of the square form, `[..., n]`.
  """
  x, y, mean_x, mean_y, x_weights, y_weights = clouds
  dim = x.shape[-1]
  basis = inverse = jnp.eye(dim, dtype=x.dtype)
  if rank < dim:
    # The range of B A applied to fixed directions: where the logits vary most.
    moved = jnp.asarray(_fixed_directions(dim, rank), x.dtype)
    moved = _times_covariance(moved, x, mean_x, x_weights)
    moved = _times_covariance(moved, y, mean_y, y_weights)
    basis, inverse = _basis(moved)
  along_x, along_y = _along(basis, x, mean_x), _along(basis, y, mean_y)
  of_x = _product(inverse, _covariance(along_x, x_weights))
  of_y = _product(inverse, _covariance(along_y, y_weights))
  # Variances of y that lie in the span, P B + B P - P B P with P = Q^T (Q Q^T)^(-1) Q.
  both = 2.0 * _weighted_sums(along_y, y, y_weights)
  both = both - narrow_einsum("...sr,...sd->...rd", of_y, basis)
  dual = narrow_einsum("...rs,...sd->...rd", inverse, basis)
  diagonal = diagonal_form(clouds, jnp.sum(dual * both, axis=-2, keepdims=True))
  of_diagonal = narrow_einsum("...rd,...sd->...rs", basis * diagonal, basis)
  correction = _coefficients(of_x, of_y) - _product(inverse, of_diagonal)
  correction = _product(correction, inverse)
  inside = narrow_einsum("...nr,...rs->...ns", along_x, correction) * along_x
  return diagonal, jnp.sum(inside, axis=-1)


def _full(clouds: Clouds) -> Float[Array, "*batch dim dim"]:
  """V of all covariances."""
  return _coefficients(
    _covariance(clouds.x - clouds.mean_x, clouds.x_weights),
    _covariance(clouds.y - clouds.mean_y, clouds.y_weights),
  )


def diagonal_form(clouds: Clouds, without: Array | None = None) -> Array:
  """v_j of each coordinate by itself, `[..., 1, dim]`, less variances of y."""
  a = _mean((clouds.x - clouds.mean_x) ** 2, clouds.x_weights)
  b = _mean((clouds.y - clouds.mean_y) ** 2, clouds.y_weights)
  if without is not None:
    b = jnp.maximum(b - without, 0.0)
  return b / (0.5 + jnp.sqrt(a * b + 0.25))


def _coefficients(
  a: Float[Array, "*batch dim dim"], b: Float[Array, "*batch dim dim"]
) -> Float[Array, "*batch dim dim"]:
  """V of covariances A and B (module docstring)."""
  return _product(b, _response(_product(a, b)))


@jax.custom_jvp
def _response(product: Float[Array, "*batch dim dim"]) -> Array:
  """(I / 2 + (A B + I / 4)^(1/2))^(-1) of A B, by products of matrices alone."""
  # With Z the inverse root it is Z (I + Z / 2)^(-1), and I + Z / 2 has eigenvalues from
  # 1 to 2: the best line through 1 / x, then Newton's iteration.
  _, inverse = _roots(product)
  eye = jnp.eye(product.shape[-1], dtype=product.dtype)
  matrix = eye + 0.5 * inverse
  quotient = (24.0 * eye - 8.0 * matrix) / 17.0
  quotient, _ = repeated(_inverse_step, _INVERSE_STEPS, quotient, matrix)
  return _product(inverse, quotient)


def _inverse_step(quotient: Array, matrix: Array) -> tuple[Array, Array]:
  eye = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
  return _product(quotient, 2.0 * eye - _product(matrix, quotient)), matrix


@_response.defjvp
def _response_jvp(primals, tangents):
  # X = dR solves R X + X R = d(A B), and the solution is the derivative of the root's
  # own iteration: no step has to be kept or transposed for the backward pass.
  (product,), (change,) = primals, tangents
  root, _ = _roots(product)

  def solve_with(product):
    def solve(_, right):
      return jax.jvp(lambda each: _roots(each)[0], (product,), (right,))[1]

    return solve

  moved = jax.lax.custom_linear_solve(
    lambda x: _product(root, x) + _product(x, root),
    change,
    solve_with(product),
    solve_with(jnp.swapaxes(product, -1, -2)),
  )
  response = _response(product)
  return response, -_product(_product(response, moved), response)


def _roots(product: Float[Array, "*batch dim dim"]) -> tuple[Array, Array]:
  """The square root of A B + I / 4, and its inverse.

  By the coupled Newton-Schulz iteration (Higham, 2008, "Functions of Matrices", section
  6.7), each step scaled for the interval in which the eigenvalues still lie (Chen and
  Chow, 2014, "A Stable Scaling of Newton-Schulz for Improving the Sign Function
  Computation"). They begin at 1/4.
  """
  eye = jnp.eye(product.shape[-1], dtype=product.dtype)
  # The eigenvalues of A B are not negative: none is above the trace. But where A and B
  # have few directions, nearly orthogonal ones, entries are large beside it.
  trace = jnp.sum(product * eye, axis=(-2, -1), keepdims=True)
  size = jnp.sqrt(jnp.sum(product**2, axis=(-2, -1), keepdims=True))
  # The result depends on no scale.
  trace, size = jax.lax.stop_gradient((trace, size))
  shift = _FLOOR * trace + jnp.maximum(0.25, _SKEW * (size - trace))
  largest = jnp.maximum(trace, size) + shift
  root = (product + shift * eye) / largest
  start = root, jnp.broadcast_to(eye, root.shape), jnp.sqrt(shift / largest)
  root, inverse, _ = repeated(_root_step, _ROOT_STEPS, *start)
  # Where rounding wins all the same, as the inverse's trace tells, the scale is left.
  trace = jnp.sum(inverse * eye, axis=(-2, -1), keepdims=True)
  most = 1.01 * eye.shape[-1] * jnp.sqrt(largest / shift)
  is_sound = (trace > 0.0) & (trace <= most)
  root, inverse = (jnp.where(is_sound, each, eye) for each in (root, inverse))
  largest = jnp.sqrt(largest)
  return largest * root, inverse / largest


def _root_step(root: Array, inverse: Array, least: Array) -> tuple[Array, ...]:
  eye = jnp.eye(root.shape[-1], dtype=root.dtype)
  scale = jnp.sqrt(3.0 / (1.0 + least + least**2))
  factor = 1.5 * scale * eye - 0.5 * scale**3 * _product(inverse, root)
  least = scale * least * (1.5 - 0.5 * (scale * least) ** 2)
  return _product(root, factor), _product(factor, inverse), least


def _product(left: Array, right: Array) -> Array:
  """left right, of square matrices.

  Small ones are sums of outer products, which XLA fuses: on 2 CPU cores 192 pairs of
  4 x 4 take all of `_coefficients` 0.3 instead of 3.3 ms.
  """
  size = left.shape[-1]
  matrices = functools.partial(exact_einsum, "...ij,...jk->...ik")
  if size > 2 * RANK:
    return matrices(left, right)

  def outer(left, right):
    terms = [left[..., :, k, None] * right[..., None, k, :] for k in range(size)]
    return functools.reduce(operator.add, terms)

  return by_platform(left, right, default=outer, onnx=matrices)


def _along(basis: Array, points: Array, middle: Array) -> Array:
  """Coordinates of points about their middle along a basis, `[..., n, rank]`."""
  products = (
    narrow_einsum("...nd,...rd->...nr", each, basis) for each in (points, middle)
  )
  return next(products) - next(products)


def _times_covariance(
  vectors: Array, points: Array, middle: Array, weights: Masses
) -> Float[Array, "*batch rank dim"]:
  """Vectors `[..., rank, dim]` times a covariance, up to their size."""
  vectors = for_each(points.shape[:-2], vectors)
  moved = _weighted_sums(_along(vectors, points, middle), points, weights)
  largest = jnp.abs(jax.lax.stop_gradient(moved)).max((-2, -1), keepdims=True)
  return moved / jnp.where(largest > 0, largest, 1.0)


def _weighted_sums(
  along: Float[Array, "*batch n rank"], points: Array, weights: Masses
) -> Float[Array, "*batch rank dim"]:
  """sum_i m_i along_ir points_id, of masses that sum to one."""
  mass = normalised(weights, points.shape[-2]).astype(points.dtype)[..., None]
  # Transposed before the product: half its time on a CPU.
  transposed = jnp.swapaxes(mass * along, -1, -2)
  return narrow_einsum("...rn,...nd->...rd", transposed, points)


def _covariance(centred: Array, weights: Masses) -> Float[Array, "*batch dim dim"]:
  mass = normalised(weights, centred.shape[-2]).astype(centred.dtype)[..., None]
  product = exact_einsum if centred.shape[-1] > 2 * RANK else narrow_einsum
  return product("...ni,...nj->...ij", centred, mass * centred)


def _basis(vectors: Float[Array, "*batch rank dim"]) -> tuple[Array, Array]:
  """A basis Q of the rows, orthonormal up to rounding, and (Q Q^T)^(-1).

  Rows that depend on others become zeros. Gram and Schmidt's coefficients have no
  gradient: what takes the inverse into account depends on the rows' span alone, so its
  derivatives (of up to third order) are those of whatever basis.
  """
  rank, dim = vectors.shape[-2:]
  eye = jnp.eye(rank, dtype=vectors.dtype)
  # Each row with its coefficients behind it.
  marked = jnp.concatenate(
    [vectors, jnp.broadcast_to(eye, (*vectors.shape[:-1], rank))], -1
  )
  marked = jax.lax.stop_gradient(marked)
  found: list[Array] = []
  present = []
  for k in range(rank):
    row = marked[..., k, :]
    whole = jnp.sum(row[..., :dim] ** 2, axis=-1, keepdims=True)
    for other in found:
      share = jnp.sum(row[..., :dim] * other[..., :dim], axis=-1, keepdims=True)
      row = row - share * other
    left = jnp.sum(row[..., :dim] ** 2, axis=-1, keepdims=True)
    counts = left > _DEPENDENT * whole
    scale = jax.lax.rsqrt(jnp.where(counts, left, 1.0))
    found.append(jnp.where(counts, row * scale, 0.0))
    present.append(counts)
  coefficients = jnp.stack(found, axis=-2)[..., dim:]
  basis = narrow_einsum("...rs,...sd->...rd", coefficients, vectors)
  gram = narrow_einsum("...rd,...sd->...rs", basis, basis)
  error = eye * jnp.stack(present, axis=-2) - gram
  # (I - E)^(-1) up to the fourth power of what rounding left.
  square = _product(error, error)
  return basis, _product(eye + error, eye + square)


def _mean(points: Array, weights: Masses) -> Float[Array, "*batch 1 dim"]:
  """Mean of points that are finite everywhere; masses enter by a product, as ones do in
  `row_sums_of`: with a mask the diagonal potentials of 8 clouds of 1,024 take 2 ms
  instead of 14.
  """
  if weights is None:
    return points.mean(-2, keepdims=True)
  mass = normalised(weights, points.shape[-2]).astype(points.dtype)
  mass = jnp.broadcast_to(mass, points.shape[:-1])
  return exact_einsum("...n,...nd->...d", mass, points)[..., None, :]


def row_sums_of(values: Float[Array, "*batch n dim"]) -> Float[Array, "*batch n"]:
  """Sums over the last axis, as a product with ones.

  XLA writes sums over rows of an expression with broadcast parts as a slow loop on a
  CPU: 1.7 instead of 0.3 ms for 8,192 rows of 64.
  """
  ones = jnp.ones((*values.shape[:-2], values.shape[-1]), values.dtype)
  return exact_einsum("...nd,...d->...n", values, ones)


def _fixed_directions(dim: int, rank: int) -> np.ndarray:
  """The first cosines of `dim` points, `[rank, dim]`: orthogonal, and none sparse."""
  angles = np.pi * np.arange(rank)[:, None] * (np.arange(dim) + 0.5) / dim
  return np.cos(angles)
