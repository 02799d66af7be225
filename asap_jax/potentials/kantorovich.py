r"""Exact one-dimensional Kantorovich potentials, and their sliced form.

For the cost $c(x, y) = -xy$ the optimal coupling of two measures on the line is the
monotone one, and its dual potentials follow from one sort a side (Santambrogio, 2015,
"Optimal Transport for Applied Mathematicians", chapter 2):

$\phi(x_{(i+1)}) - \phi(x_{(i)}) = -Q_y(u_i) (x_{(i+1)} - x_{(i)})$,

where $Q_y$ is the quantile function of y and $u_i$ the mass of the first i points of x.
Where $u_i$ falls on a jump of $Q_y$, any value between its two sides is optimal. Both
sides take the midpoint: with it $\phi + \psi = c$ holds wherever mass is coupled.

How that is computed depends on the device: a CPU sorts fast by networks and looks up
(`on_cpu`), accelerators sort only and look nothing up (`on_accelerators`), ONNX has no
loops that data end (`on_onnx`).
"""

from typing import Literal, NamedTuple

from jaxtyping import Array, Float

from asap_jax import masses
from asap_jax.masses import Masses, check_weights, zero_invalid
from asap_jax.numerics import exact_einsum, float_dtype, for_each, narrow_einsum
from asap_jax.platforms import by_platform
from asap_jax.potentials import on_accelerators, on_cpu, on_onnx
from asap_jax.sizes import at_most

# Up to so many a TPU projects by products and sums.
_FEW_SLICES = 8


class Potentials(NamedTuple):
  r"""Dual potentials of a one-dimensional transport problem; zero on absent points.

  >>> x, y = jnp.array([0.0, 2.0]), jnp.array([5.0, 3.0])
  >>> asap_jax.kantorovich_potentials(x, y).transport.tolist()  # 0 to 3, 2 to 5
  [3.0, 5.0]

  Attributes:
    phi: potential of the points x, `[..., n]`, zero at the smallest of them.
    psi: potential of the points y, `[..., m]`; $\phi_i + \psi_j \le c(x_i, y_j)$, with
      equality where the optimal coupling has mass.
    transport: median of the mass that $x_i$ sends, `[..., n]`: $Q_y$ half-way through
      the mass of $x_i$, so the optimal map itself where there is one.
  """

  phi: Float[Array, "... n"]
  psi: Float[Array, "... m"]
  transport: Float[Array, "... n"]


def kantorovich_potentials(
  x: Float[Array, "*batch n"],
  y: Float[Array, "*batch m"],
  x_weights: Masses = None,
  y_weights: Masses = None,
  *,
  cost: Literal["product", "squared"] = "product",
) -> Potentials:
  r"""Exact dual potentials of transport on the line: one sort a side, no iteration.

  $\max_{\phi, \psi} \sum_i a_i \phi_i + \sum_j b_j \psi_j$ subject to
  $\phi_i + \psi_j \le c(x_i, y_j)$.

  Works under jit, vmap and grad. Potentials are piecewise smooth in x and y, and equal
  (up to rounding) where points are. They are piecewise constant in the weights: that
  gradient is zero.

  >>> x, y = jnp.array([0.0, 1.0, 3.0]), jnp.array([2.0, 1.0, 4.0])
  >>> potentials = asap_jax.kantorovich_potentials(x, y)
  >>> round(float(potentials.phi.sum() + potentials.psi.sum()), 3)  # -(0 + 2 + 12)
  -14.0

  Args:
    x: points `[..., n]`, in any order.
    y: points `[..., m]`.
    x_weights: `None`, mask or masses `[..., n]` (see `asap_jax.masses`); masses below
      two millionths of the total are not told apart.
    y_weights: masses of y, `[..., m]`.
    cost: `"product"` is -xy, `"squared"` is (x - y)^2 / 2.

  Returns:
    `Potentials`, in the order of the inputs, at least float32.

  Raises:
    ValueError: if points or weights do not fit, if `cost` is unknown, or if n * m
      exceeds 2^31, but where n = m and there are no weights.
  """
  if min(x.ndim, y.ndim) < 1 or x.shape[:-1] != y.shape[:-1]:
    raise ValueError(
      f"x {x.shape} and y {y.shape}: expected [..., n] and [..., m], with equal batch "
      "axes"
    )
  n, m = x.shape[-1], y.shape[-1]
  check_weights("x_weights", x_weights, n)
  check_weights("y_weights", y_weights, m)
  if cost not in ("product", "squared"):
    raise ValueError(f"cost={cost!r}: expected 'product' or 'squared'")
  one_to_one = n == m and x_weights is None and y_weights is None
  if at_most(n * m, 2**31) is False and not one_to_one:
    raise ValueError(f"n * m = {n} * {m}: expected at most 2^31, for exact mass ratios")
  dtype = float_dtype(x, y)
  x, y = x.astype(dtype), y.astype(dtype)
  phi, psi, transport = by_platform(
    *(x, y, x_weights, y_weights),
    cpu=on_cpu.potentials,
    onnx=on_onnx.potentials,
    default=on_accelerators.potentials,
  )
  if cost == "squared":
    # Absent points may hold anything: zeroed before the square, for the gradient.
    phi = phi + zero_invalid(x, x_weights) ** 2 / 2
    psi = psi + zero_invalid(y, y_weights) ** 2 / 2
  return Potentials(
    zero_invalid(phi, x_weights),
    zero_invalid(psi, y_weights),
    zero_invalid(transport, x_weights),
  )


def sliced_potentials(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  directions: Float[Array, "*#batch slices dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> tuple[Potentials, Float[Array, "*batch slices n"]]:
  """Potentials of the cost -xy along every direction, all heads and slices at once.

  Works under jit, vmap and grad, in the directions too.

  >>> query, key = jnp.ones((2, 5, 3)), jnp.ones((2, 7, 3))
  >>> potentials, projected = asap_jax.sliced_potentials(query, key, jnp.eye(3)[None])
  >>> potentials.phi.shape, potentials.psi.shape, projected.shape
  ((2, 3, 5), (2, 3, 7), (2, 3, 5))

  Args:
    query: `[..., n, dim]`.
    key: `[..., m, dim]`.
    directions: `[..., slices, dim]`, broadcast over leading axes, used as given.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: masses of the keys, `[..., m]`.

  Returns:
    `Potentials` with arrays `[..., slices, n]` and `[..., slices, m]`, and the
    projected queries `[..., slices, n]`.

  Raises:
    ValueError: if the head dimensions of the arguments differ, or the weights do not
      fit.
  """
  arrays = query, key, directions
  shapes = f"query {query.shape}, key {key.shape} and directions {directions.shape}"
  if min(array.ndim for array in arrays) < 2:
    raise ValueError(f"{shapes}: expected [..., length, dim] for each")
  if len({array.shape[-1] for array in arrays}) > 1:
    raise ValueError(f"{shapes}: expected the same last dimension")
  check_weights("query_weights", query_weights, query.shape[-2])
  check_weights("key_weights", key_weights, key.shape[-2])
  product = narrow_einsum if directions.shape[-2] <= _FEW_SLICES else exact_einsum
  x, y = (
    product(
      "...nd,...ld->...nl", points, for_each(points.shape[:-2], directions)
    ).swapaxes(-1, -2)
    for points in (query, key)
  )
  return kantorovich_potentials(x, y, *masses.by_slice(query_weights, key_weights)), x
