"""The learned dual map: from features of a sequence to its Sinkhorn query-side dual.

`predict` holds the map and applies it, `features` computes what it is linear in, and
`network` is what may be added to the linear part.
"""

from asap_jax.dual_map.features import dual_features
from asap_jax.dual_map.network import Network
from asap_jax.dual_map.predict import DualMap, predict_dual

__all__ = ["DualMap", "Network", "dual_features", "predict_dual"]
