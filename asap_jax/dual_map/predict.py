"""The learned dual map: from features of one sequence to the Sinkhorn query-side dual.

f_hat_i = sum_p w_p feature_p(i) (`asap_jax.dual_map.features`; Tran, Milkert and Hyde,
2026, "ASAP", arXiv 2605.12879); a small network may add to it
(`asap_jax.dual_map.network`).
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from asap_jax.dual_map.features import FEATURES, feature_count, features_of
from asap_jax.dual_map.network import Leaf, Network, apply_network
from asap_jax.masses import Weights, centre


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DualMap:
  """Parameters of a compiled attention layer: a pytree.

  Attributes:
    directions: slices, `[heads, slices, dim]`; normalised where they are used.
    weights: of the features, `[heads, features]`.
    features: the kinds of features, a subset of `asap_jax.dual_map.features.KINDS` in
      that order (static).
    network: adds to the linear map; `None` leaves it linear.
    relaxation: over-relaxation factors between closures, `[heads, closures - 1]`
      (`asap_jax.c_transform.closures`); `None` for a single closure.
  """

  directions: Leaf
  weights: Leaf
  features: tuple[str, ...] = dataclasses.field(
    default=FEATURES, metadata={"static": True}
  )
  network: Network | Leaf = None
  relaxation: Leaf = None

  @property
  def closures(self) -> int:
    """Two-sided closures that follow the prediction."""
    return 1 if self.relaxation is None else 1 + self.relaxation.shape[-1]


def predict_dual(
  dual_map: DualMap,
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  products: Float[Array, "*batch heads n m"] | None = None,
  centred: bool = True,
) -> Float[Array, "*batch heads n"]:
  """f_hat, the predicted query-side dual, by default centred over the valid queries.

  Works under jit, vmap and grad, in all array leaves of `dual_map`.

  Args:
    dual_map: parameters.
    query: `[..., heads, n, dim]`, scaled such that the logits are `query key^T`.
    key: `[..., heads, m, dim]`.
    query_weights: `None`, mask or masses, `[..., heads or 1, n]`.
    key_weights: likewise, `[..., heads or 1, m]`.
    products: query key^T where it is at hand, finite at absent points too: the
      cumulants of a linear map cost one pass over it then instead of a covariance.
    centred: otherwise f_hat is off by a constant of each sequence and head, which a
      closure takes back.

  Returns:
    `[..., heads, n]`, float32 or better, zero at absent queries.

  Raises:
    ValueError: if the weights of `dual_map` do not have one column per feature, or as
      `asap_jax.dual_map.dual_features`.
  """
  expected = feature_count(dual_map.features, *dual_map.directions.shape[-2:])
  if dual_map.weights.shape[-1] != expected:
    raise ValueError(
      f"dual_map.weights has shape {dual_map.weights.shape}: expected {expected} "
      f"features for {dual_map.features} with directions {dual_map.directions.shape}"
    )
  features = features_of(
    query,
    key,
    dual_map.directions,
    dual_map.features,
    query_weights,
    key_weights,
    # XLA fuses a linear map with the closure on a CPU; a network would have the
    # products kept in memory.
    products if dual_map.network is None else None,
  )
  f = features.times(dual_map.weights[..., None])[..., 0]
  if centred:
    f = centre(f, query_weights)
  if dual_map.network is None:
    return f
  return f + apply_network(dual_map.network, features, query, key, key_weights)
