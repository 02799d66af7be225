"""Doubly-stochastic attention that is cheap to deploy.

Train with Sinkhorn attention, then `compile` the model: each attention layer becomes a
learned map from exact one-dimensional potentials to the Sinkhorn dual, and one entropic
closure. The numerical core is pure functions on arrays; see the modules `potentials`,
`dual_map`, `c_transform`, `sinkhorn`, `calibrate` and `metrics`.
"""

from typing import TYPE_CHECKING

from asap_jax.amortized import (
  dual_gradient,
  dual_objective,
  fit_by_objective,
  fit_by_regression,
  unsliced_map,
)
from asap_jax.artifact import load, save
from asap_jax.attention import asap_attention, sinkhorn_attention, softmax_attention
from asap_jax.c_transform import (
  Duals,
  apply_plan,
  closure,
  closures,
  plan,
)
from asap_jax.chunked import chunked_attention
from asap_jax.compiler import Compiled, compile
from asap_jax.cudnn import cudnn_attention
from asap_jax.distillation import Distilled, distil
from asap_jax.dual_map import DualMap, predict_dual
from asap_jax.features import dual_features
from asap_jax.fused import scaled_attention
from asap_jax.layers import AsapAttention, DualParam, SinkhornMultiHeadAttention
from asap_jax.potentials import Potentials, kantorovich_potentials, sliced_potentials
from asap_jax.report import Alternative, LayerReport, Report
from asap_jax.scaling import ScaledPlan, scaled_plan
from asap_jax.sinkhorn import sinkhorn_duals, sinkhorn_source_dual
from asap_jax.sliced_start import Slices, paired_slices, sliced_start

__version__ = "0.1.0"

__all__ = [
  "Alternative",
  "AsapAttention",
  "Compiled",
  "Distilled",
  "DualMap",
  "DualParam",
  "Duals",
  "LayerReport",
  "Potentials",
  "Report",
  "ScaledPlan",
  "SinkhornMultiHeadAttention",
  "SlicedDualInitializer",
  "Slices",
  "apply_plan",
  "asap_attention",
  "chunked_attention",
  "closure",
  "closures",
  "compile",
  "cudnn_attention",
  "distil",
  "dual_features",
  "dual_gradient",
  "dual_objective",
  "fit_by_objective",
  "fit_by_regression",
  "kantorovich_potentials",
  "load",
  "paired_slices",
  "plan",
  "predict_dual",
  "save",
  "scaled_attention",
  "scaled_plan",
  "sinkhorn_attention",
  "sinkhorn_duals",
  "sinkhorn_source_dual",
  "sliced_potentials",
  "sliced_start",
  "softmax_attention",
  "unsliced_map",
]


# A class of OTT-JAX's kind: imported where it is asked for, since compiled models are
# served without OTT-JAX.
if TYPE_CHECKING:
  from asap_jax.initializer import SlicedDualInitializer
else:

  def __getattr__(name: str) -> object:
    if name == "SlicedDualInitializer":
      from asap_jax.initializer import SlicedDualInitializer

      return SlicedDualInitializer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
