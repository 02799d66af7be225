"""Sliced potentials as the start of Sinkhorn, for any problem of OTT-JAX."""

from typing import Any

import jax
import jax.numpy as jnp
from ott.geometry import costs, pointcloud
from ott.initializers.linear import initializers
from ott.problems.linear import linear_problem

from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import centre, masses, mean, zero_invalid
from asap_jax.potentials.summed import Slicing, sliced_start

# Columns that a random range finder draws beyond the rank asked for.
_OVERSAMPLING = 8


@jax.tree_util.register_pytree_node_class
class SlicedDualInitializer(initializers.DefaultInitializer):
  """Starts OTT-JAX's Sinkhorn at sliced potentials, or at those that a map predicts.

  Pass it as `Sinkhorn(initializer=...)` or `linear.solve(..., initializer=...)`. Costs
  |x - y|^2 and -<x, y> of a point cloud are sliced as they are, `scale_cost` included,
  whatever the masses (zero ones too), sizes and epsilon; of a schedule, the first
  epsilon counts. Any other geometry needs `points` or `rank`. Sinkhorn's own first
  half-step makes g, so that side starts at zero. It is a pytree, and works under jit
  and vmap.

  Args:
    dual_map: of one head, fitted on alike problems in units of logits
      (`asap_jax.compiler.fitting.objective`); `None` takes `sliced_start`, which needs
      no fit.
    slices: as in `sliced_start`; unused with a `dual_map`.
    entropic: likewise.
    points: x `[n, dim]` and y `[m, dim]` such that the cost is -<x, y> up to terms that
      depend on one side alone; for instance scaled queries and keys.
    rank: finds such points for any other cost, by a random projection of the doubly
      centred cost matrix (Halko et al., 2011, "Finding Structure with Randomness",
      algorithm 4.4 with one power step): four products with it. What is beyond the rank
      is ignored.

  Raises:
    ValueError: if `dual_map` has several heads, both `points` and `rank` are given, or
      `rank` is below one; when called, if the geometry needs either or `points` do not
      fit it.
  """

  def __init__(
    self,
    dual_map: DualMap | None = None,
    *,
    slices: Slicing | Any = "canonical",
    entropic: bool = True,
    points: tuple[Any, Any] | None = None,
    rank: int | None = None,
  ):
    super().__init__()
    # Trees of other leaves than arrays pass through here: shapes only where there are.
    heads = getattr(getattr(dual_map, "weights", None), "shape", (1, 0))[-2]
    if heads != 1:
      raise ValueError(f"dual_map has {heads} heads: expected one")
    if points is not None and rank is not None:
      raise ValueError(f"points and rank={rank} are given: expected at most one")
    if rank is not None and rank < 1:
      raise ValueError(f"rank={rank}: expected at least one")
    self.dual_map, self.slices, self.entropic = dual_map, slices, entropic
    self.points, self.rank = points, rank

  def init_fu(
    self,
    ot_prob: linear_problem.LinearProblem,
    lse_mode: bool,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """f in OTT's units, or its scaling; see the base class."""
    geometry, a, b = ot_prob.geom, ot_prob.a, ot_prob.b
    epsilon = geometry.epsilon_scheduler(0)
    x, y, own = self._product_form(ot_prob, rng)
    query = x / epsilon
    if self.dual_map is None:
      f = sliced_start(query, y, a, b, slices=self.slices, entropic=self.entropic)
    else:
      tokens = (query[None], y[None], a[None], b[None])
      f = predict_dual(self.dual_map, *tokens)[0]
    # Masses are in f in this convention, and the start knows nothing of them.
    f = f + own / epsilon + jnp.log(jnp.where(a > 0, a, 1.0))
    f = (epsilon * centre(f, a)).astype(ot_prob.dtype)
    return f if lse_mode else geometry.scaling_from_potential(f)

  def _product_form(
    self, problem: linear_problem.LinearProblem, rng: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, y and u such that the cost is u_i + v_j - <x_i, y_j>."""
    geometry, a, b = problem.geom, problem.a, problem.b
    if self.rank is None and self.points is None:
      cost = getattr(geometry, "cost_fn", None)
      if not isinstance(geometry, pointcloud.PointCloud) or not isinstance(
        cost, costs.SqEuclidean | costs.NegDotProduct
      ):
        raise ValueError(
          f"{type(geometry).__name__} with cost {type(cost).__name__}: expected a "
          "PointCloud with SqEuclidean or NegDotProduct; pass points= whose negative "
          "inner products are the cost, or rank="
        )
      scale = geometry.inv_scale_cost
      x = zero_invalid(geometry.x, a, axis=-2)
      if isinstance(cost, costs.NegDotProduct):
        return scale * x, geometry.y, jnp.zeros_like(a)
      return 2.0 * scale * x, geometry.y, scale * jnp.sum(x**2, axis=-1)
    if self.points is None:
      assert self.rank is not None  # else it is a point cloud
      return _embedding(geometry.cost_matrix, a, b, self.rank, rng)
    x, y = self.points
    if x.ndim != 2 or y.ndim != 2 or (len(x), len(y)) != geometry.shape:
      raise ValueError(
        f"points have shapes {x.shape} and {y.shape}: expected [{geometry.shape[0]}, "
        f"dim] and [{geometry.shape[1]}, dim], as the cost"
      )
    x, y = zero_invalid(x, a, axis=-2), zero_invalid(y, b, axis=-2)
    # Of the cost, what the product leaves of its mean over y is the term of x alone.
    mass = masses(b, len(y))
    rest = geometry.apply_cost(mass, axis=1).reshape(-1)
    return x, y, rest + _matmul(x, (mass @ y)[:, None])[:, 0]

  def tree_flatten(self):  # noqa: D102
    sliced = isinstance(self.slices, str)
    children = (self.dual_map, None if sliced else self.slices, self.points)
    return children, (self.slices if sliced else None, self.entropic, self.rank)

  @classmethod
  def tree_unflatten(cls, aux_data, children):  # noqa: D102
    (dual_map, directions, points), (kind, entropic, rank) = children, aux_data
    slices = directions if kind is None else kind
    return cls(dual_map, slices=slices, entropic=entropic, points=points, rank=rank)


def _embedding(
  cost: jax.Array, a: jax.Array, b: jax.Array, rank: int, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x, y and u, from the leading part of the doubly centred cost."""
  cost = jnp.where((a[:, None] > 0) & (b > 0), cost, 0.0)
  own = mean(cost, b)[:, 0]
  product = -centre(centre(cost, b), a, axis=-2)
  columns = min(rank + _OVERSAMPLING, *cost.shape)
  rng = jax.random.key(0) if rng is None else rng
  drawn = jax.random.normal(rng, (cost.shape[1], columns), cost.dtype)
  found = _matmul(product.T, jnp.linalg.qr(_matmul(product, drawn))[0])
  basis = jnp.linalg.qr(_matmul(product, jnp.linalg.qr(found)[0]))[0]
  return basis, _matmul(product.T, basis), own


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
