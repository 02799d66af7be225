"""Starts of OTT-JAX's Sinkhorn between point clouds: Gaussian, and sliced potentials.

Both are query-side duals of logits -cost / epsilon, made of the points and their masses
before the first iteration.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from ott.geometry import costs, pointcloud
from ott.initializers.linear import initializers
from ott.problems.linear import linear_problem

from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import centre, log_masses, zero_invalid
from asap_jax.potentials.gaussian import (
  RANK,
  Covariances,
  check_covariances,
  gaussian_potential,
)
from asap_jax.potentials.summed import Slicing, check_slicing, sliced_start


class _CloudInitializer(initializers.DefaultInitializer, abc.ABC):
  """A start for clouds of cost |x - y|^2 or -<x, y>."""

  @abc.abstractmethod
  def dual(
    self, query: jax.Array, key: jax.Array, a: jax.Array, b: jax.Array
  ) -> jax.Array:
    """The query-side dual of the logits query key^T, without logarithms of masses."""

  def init_fu(
    self,
    ot_prob: linear_problem.LinearProblem,
    lse_mode: bool,
    rng: jax.Array | None = None,
  ) -> jax.Array:
    """Query-side dual in OTT's units, or its scaling; see the base class."""
    geometry, a, b = ot_prob.geom, ot_prob.a, ot_prob.b
    cost = getattr(geometry, "cost_fn", None)
    if not isinstance(geometry, pointcloud.PointCloud) or not isinstance(
      cost, costs.SqEuclidean | costs.NegDotProduct
    ):
      raise ValueError(
        f"{type(geometry).__name__} with cost {type(cost).__name__}: expected a "
        "PointCloud with SqEuclidean or NegDotProduct"
      )
    epsilon = geometry.epsilon_scheduler(0)
    x = zero_invalid(geometry.x, a, axis=-2)
    query, own = geometry.inv_scale_cost * x / epsilon, jnp.zeros_like(a)
    if isinstance(cost, costs.SqEuclidean):
      # |x - y|^2 = |x|^2 - 2 <x, y> + |y|^2; f takes the first term, g, which
      # Sinkhorn's first half-step makes, the last.
      query, own = 2.0 * query, jnp.sum(x * query, axis=-1)
    f = self.dual(query, geometry.y, a, b)
    # Masses are in f in this convention, and the start knows nothing of them.
    f = f + own + jnp.log(jnp.where(a > 0, a, 1.0))
    f = (epsilon * centre(f, a)).astype(ot_prob.dtype)
    return f if lse_mode else geometry.scaling_from_potential(f)


@jax.tree_util.register_pytree_node_class
class GaussianDualInitializer(_CloudInitializer):
  r"""Starts OTT-JAX's Sinkhorn at the entropic potential between Gaussians.

  Their means and covariances are those of the clouds (`asap_jax.gaussian_potential`).
  OTT-JAX's `GaussianInitializer` takes the potential without entropy, which is another
  one wherever epsilon counts. Pass it as `Sinkhorn(initializer=...)` or
  `linear.solve(..., initializer=...)`. It serves point clouds of cost $|x - y|^2$ or
  $-\langle x, y \rangle$, `scale_cost` included, whatever the masses (zero ones too),
  sizes and epsilon; of a schedule, the first epsilon counts. It works under jit, vmap
  and grad.

  >>> from ott.geometry import pointcloud
  >>> from ott.solvers import linear
  >>> x, y = jax.random.normal(jax.random.key(0), (2, 16, 2))
  >>> start = asap_jax.GaussianDualInitializer()
  >>> output = linear.solve(pointcloud.PointCloud(x, y, epsilon=0.5), initializer=start)
  >>> bool(output.converged)
  True

  Args:
    covariances: as in `asap_jax.gaussian_potential`.
    rank: likewise.

  Raises:
    ValueError: if the covariances are unknown or there is no `rank`; when called, if
      the geometry is no point cloud of such a cost.
  """

  def __init__(self, covariances: Covariances = "full", rank: int = RANK):
    super().__init__()
    check_covariances(covariances, rank)
    self.covariances, self.rank = covariances, rank

  def dual(self, query, key, a, b):
    """See the base class."""
    options: dict[str, Any] = {"covariances": self.covariances, "rank": self.rank}
    return gaussian_potential(query, key, a, b, **options)

  def tree_flatten(self):  # noqa: D102
    return (), (self.covariances, self.rank)

  @classmethod
  def tree_unflatten(cls, aux_data, children):  # noqa: D102
    return cls(*aux_data)


@jax.tree_util.register_pytree_node_class
class SlicedDualInitializer(_CloudInitializer):
  r"""Starts OTT-JAX's Sinkhorn at sliced potentials, or at those that a map predicts.

  It serves the same problems as `asap_jax.GaussianDualInitializer`, and is passed
  likewise. It is a pytree, and works under jit and vmap.

  >>> from ott.geometry import pointcloud
  >>> from ott.solvers import linear
  >>> x, y = jax.random.normal(jax.random.key(0), (2, 16, 2))
  >>> start = asap_jax.SlicedDualInitializer()
  >>> output = linear.solve(pointcloud.PointCloud(x, y, epsilon=0.5), initializer=start)
  >>> bool(output.converged)
  True

  Args:
    dual_map: of one head, fitted on alike problems in units of logits
      (`asap_jax.compiler.fitting.objective`), predicting f; `None` takes
      `sliced_start`, which needs no fit.
    slices: as in `sliced_start`; unused with a `dual_map`.
    entropic: as in `sliced_start`; unused with a `dual_map`.

  Raises:
    ValueError: if `dual_map` has several heads or predicts g, or `slices` are unknown;
      when called, if the geometry is no point cloud of such a cost.
  """

  def __init__(
    self,
    dual_map: DualMap | None = None,
    *,
    slices: Slicing | Any = "canonical",
    entropic: bool = True,
  ):
    super().__init__()
    # Trees of other leaves than arrays pass through here: shapes only where there are.
    heads = getattr(getattr(dual_map, "weights", None), "shape", (1, 0))[-2]
    if heads != 1:
      raise ValueError(f"dual_map has {heads} heads: expected one")
    if getattr(dual_map, "side", "query") != "query":
      raise ValueError("dual_map predicts the key side's dual: expected the query's")
    if isinstance(slices, str):
      check_slicing("slices", slices)
    self.dual_map, self.slices, self.entropic = dual_map, slices, entropic

  def dual(self, query, key, a, b):
    """See the base class."""
    if self.dual_map is None:
      options: dict[str, Any] = {"slices": self.slices, "entropic": self.entropic}
      return sliced_start(query, key, a, b, **options)
    given = query[None], key[None], a[None], b[None]
    return predict_dual(self.dual_map, *given)[0] - log_masses(a)

  def tree_flatten(self):  # noqa: D102
    # A name is no leaf, directions are.
    named = isinstance(self.slices, str)
    children = (self.dual_map, None if named else self.slices)
    return children, (self.slices if named else None, self.entropic)

  @classmethod
  def tree_unflatten(cls, aux_data, children):  # noqa: D102
    (dual_map, directions), (name, entropic) = children, aux_data
    slices = directions if name is None else name
    return cls(dual_map, slices=slices, entropic=entropic)
