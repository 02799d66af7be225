r"""The learned dual map: from features of one sequence to the Sinkhorn query-side dual.

$\hat f_i = \sum_p w_p \, \mathrm{feature}_p(i)$ (`features`; Tran, Milkert and Hyde,
2026, "ASAP", arXiv 2605.12879); a small network may add to it
(`asap_jax.dual_map.network`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.dual_map.features import (
  FEATURES,
  Features,
  feature_count,
  features_of,
  split_columns,
  spread,
)
from asap_jax.dual_map.network import Leaf, Network, apply_network
from asap_jax.masses import Masses, Side, centre, log_masses, mean
from asap_jax.potentials.gaussian import (
  clouds_of,
  diagonal_form,
  low_rank_form,
  row_sums_of,
)
from asap_jax.sizes import at_most


class Steps(TypedDict):
  """What closures do between one another, and from where: arguments of all of them."""

  relaxation: Leaf
  momentum: Leaf
  side: Side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualMap:
  """Parameters of a compiled attention layer: a pytree.

  Attributes:
    directions: slices, `[heads, slices, dim]`; normalised where they are used.
    weights: of the features, `[heads, features]`.
    features: kinds of features, a subset of `asap_jax.dual_map.features.KINDS` in
      that order (static).
    network: adds to the linear map; `None` leaves it linear.
    relaxation: over-relaxation factors between closures, `[heads, closures - 1]`
      (`asap_jax.closures`); `None` for a single closure.
    momentum: factors of the step before, like `relaxation`; `None` for none.
    side: whose dual is predicted (static). From `"key"`, queries and keys change places
      in all features, and half a closure takes g to the f that the first closure needs.
    half: whether that half of a closure is all that follows, so that the plan is the
      softmax of S + g (static); only from `"key"`.

  Example:
    >>> import jax.numpy as jnp
    >>> one_slice = DualMap(jnp.ones((4, 1, 8)), jnp.ones((4, 1)), ("potentials",))
    >>> one_slice.closures, sorted(one_slice.to_named())
    (1, ['directions', 'weights'])
  """

  directions: Leaf
  weights: Leaf
  features: tuple[str, ...] = dataclasses.field(
    default=FEATURES, metadata={"static": True}
  )
  network: Network | Leaf = None
  relaxation: Leaf = None
  momentum: Leaf = None
  side: Side = dataclasses.field(default="query", metadata={"static": True})
  half: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def closures(self) -> int:
    """Two-sided closures that follow the prediction."""
    if self.half:
      return 0
    return 1 if self.relaxation is None else 1 + self.relaxation.shape[-1]

  @property
  def is_sliced(self) -> bool:
    """Whether it sorts along slices."""
    return "potentials" in self.features or "transport" in self.features

  @property
  def steps(self) -> Steps:
    """Arguments of closures, `asap_jax.closures` and all its forms."""
    return Steps(relaxation=self.relaxation, momentum=self.momentum, side=self.side)

  def with_closures(self, count: int) -> "DualMap":
    """The map followed by `count` plain closures, whose factors can be learned.

    Momentum comes with the third closure: before it there is no step to repeat.
    """
    shape = (*self.weights.shape[:-1], count - 1)
    return dataclasses.replace(
      self,
      relaxation=jnp.ones(shape) if count > 1 else None,
      momentum=jnp.zeros(shape) if count > 2 else None,
      half=False,
    )

  def to_named(self) -> dict[str, Leaf]:
    """The array leaves by name, those of the network as `network_...`: as saved."""
    named = {name: getattr(self, name) for name in ("directions", "weights")}
    if self.network is not None:
      names = [field.name for field in dataclasses.fields(Network)]
      named |= {f"network_{name}": getattr(self.network, name) for name in names}
    for name in ("relaxation", "momentum"):
      if getattr(self, name) is not None:
        named[name] = getattr(self, name)
    return named

  @classmethod
  def from_named(
    cls, named: Mapping[str, Leaf], features: tuple[str, ...], **static: Any
  ) -> "DualMap":
    """The map whose `to_named` these leaves are; `static` are its other fields."""
    own = {k: v for k, v in named.items() if not k.startswith("network_")}
    rest = {k.removeprefix("network_"): named[k] for k in named.keys() - own.keys()}
    network = Network(**rest) if rest else None
    return cls(features=features, network=network, **own, **static)


def predict_dual(
  dual_map: DualMap,
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch heads points"]:
  r"""The predicted dual, centred over the valid points: $\hat f$, or $\hat g$.

  With float masses it contains their logarithms, which no feature knows of. Works under
  jit, vmap and grad, in all array leaves of `dual_map`.

  Args:
    dual_map: parameters.
    query: `[..., heads, n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., heads, m, dim]`.
    query_weights: `None`, mask or masses, `[..., heads or 1, n]`.
    key_weights: the same of the keys, `[..., heads or 1, m]`.

  Returns:
    `[..., heads, n]` (`m` if the map is of the key side), float32 or better, zero at
    absent points.

  Raises:
    ValueError: if the weights of `dual_map` do not have one column per feature, or as
      `asap_jax.dual_map.dual_features`.

  Example:
    >>> import jax.numpy as jnp
    >>> dual_map = DualMap(jnp.ones((1, 1, 2)), jnp.ones((1, 2)), features=("query",))
    >>> query = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    >>> predict_dual(dual_map, query, query).tolist()  # q_1 + q_2, centred
    [[-2.0, 2.0]]
  """
  tokens = _from_side(dual_map, query, key, query_weights, key_weights)
  features = _features(dual_map, *tokens)
  dual = centre(_linear(dual_map, features) + log_masses(tokens[2]), tokens[2])
  if dual_map.network is None:
    return dual
  own, other, _, other_weights = tokens
  return dual + apply_network(dual_map.network, features, own, other, other_weights)


def linear_dual(
  dual_map: DualMap,
  query: Array,
  key: Array,
  query_weights: Masses,
  key_weights: Masses,
  products: Array,
) -> Float[Array, "*batch heads points"]:
  """The linear part of `predict_dual`, not centred, from query key^T at hand.

  Args:
    dual_map: see `predict_dual`, as the next four.
    query: see there.
    key: see there.
    query_weights: see there.
    key_weights: see there.
    products: query key^T, `[..., heads, n, m]`, finite at absent points too.
  """
  tokens = _from_side(dual_map, query, key, query_weights, key_weights)
  own, other, *weights = tokens
  of_masses = log_masses(weights[0])
  if dual_map.side == "key":
    products = jnp.swapaxes(products, -1, -2)
  if dual_map.is_sliced:
    return _linear(dual_map, _features(dual_map, *tokens, products)) + of_masses
  of_kind = split_columns(dual_map.weights, dual_map.features, 0, own.shape[-1])
  clouds = clouds_of(own, other, *weights)
  # All that is linear or square in the coordinates is one pass over them.
  linear = square = jnp.zeros_like(clouds.mean_x)
  dual = jnp.zeros(own.shape[:-1]) + of_masses
  if "query" in of_kind:
    linear = linear + of_kind["query"][..., None, :]
  if "cumulants" in of_kind:
    first, second = jnp.split(of_kind["cumulants"][..., None], 2, axis=-2)
    linear = linear + first * clouds.mean_y
    dual = dual + second[..., 0] * _spread(own, other, weights[1], products)
  if "gaussian_diagonal" in of_kind:
    square = of_kind["gaussian_diagonal"][..., None, :] * diagonal_form(clouds)
    linear = linear - 2.0 * square * clouds.mean_x
  if "gaussian" in of_kind:
    dual = dual + of_kind["gaussian"] * low_rank_form(clouds)
  return dual + row_sums_of(clouds.x * (linear + square * clouds.x))


def _spread(query: Array, key: Array, key_weights: Masses, products: Array) -> Array:
  """Second cumulant of each query's products, `[..., n]`."""
  if not at_most(key.shape[-2], 2 * key.shape[-1]):
    # Two products with a covariance take less than three passes over all pairs.
    return spread(query, key, key_weights)
  by_key = None if key_weights is None else key_weights[..., None, :]
  deviations = products - mean(products, by_key)
  return mean(deviations**2, by_key)[..., 0]


def _from_side(
  dual_map: DualMap,
  query: Array,
  key: Array,
  query_weights: Masses,
  key_weights: Masses,
) -> tuple[Array, Array, Masses, Masses]:
  """Points of the predicted side, points of the other, and the masses of both."""
  if dual_map.side == "key":
    return key, query, key_weights, query_weights
  return query, key, query_weights, key_weights


def _features(
  dual_map: DualMap,
  query: Array,
  key: Array,
  query_weights: Masses,
  key_weights: Masses,
  products: Array | None = None,
) -> Features:
  kinds, directions = dual_map.features, dual_map.directions
  expected = feature_count(kinds, *directions.shape[-2:])
  if dual_map.weights.shape[-1] != expected:
    raise ValueError(
      f"dual_map.weights has shape {dual_map.weights.shape}: expected {expected} "
      f"features for {kinds} with directions {directions.shape}"
    )
  return features_of(
    query, key, directions, kinds, query_weights, key_weights, products
  )


def _linear(dual_map: DualMap, features: Features) -> Array:
  return features.times(dual_map.weights[..., None])[..., 0]
