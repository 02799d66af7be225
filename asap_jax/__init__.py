"""Doubly-stochastic attention that is cheap to train and to deploy.

Train with Sinkhorn attention, then `compile` the model: each attention layer becomes a
learned map from exact one-dimensional potentials to the Sinkhorn dual, and one entropic
closure. Or train from a Gaussian start, which makes one to three iterations enough.
Rooms bear the method's words: `potentials`, `dual_map`, `c_transform`, `teacher`,
`attention`, `compiler`; names that are not here are imported from them.
"""

from typing import TYPE_CHECKING

from asap_jax.attention import (
  AmortizedAttention,
  AmortizedMultiHeadAttention,
  AsapAttention,
  DualParam,
  SinkhornMultiHeadAttention,
  asap_attention,
  dual_loss,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.c_transform import Duals, closure, closures, plan
from asap_jax.compiler import (
  AttentionCall,
  Recipe,
  choose,
  compile,
  compile_linen,
  distil,
  fit,
  load,
  monitor,
  save,
  to_sinkhorn,
  watch,
)
from asap_jax.diagnosis import Diagnosis, diagnose
from asap_jax.dual_map import DualMap, predict_dual
from asap_jax.potentials import (
  Potentials,
  gaussian_potential,
  kantorovich_potentials,
  sliced_potentials,
)
from asap_jax.serving import export, export_onnx
from asap_jax.teacher import sinkhorn_duals

__version__ = "0.1.0"

__all__ = [
  "AmortizedAttention",
  "AmortizedMultiHeadAttention",
  "AsapAttention",
  "AttentionCall",
  "Diagnosis",
  "DualMap",
  "DualParam",
  "Duals",
  "GaussianDualInitializer",
  "Potentials",
  "Recipe",
  "SinkhornMultiHeadAttention",
  "SlicedDualInitializer",
  "asap_attention",
  "choose",
  "closure",
  "closures",
  "compile",
  "compile_linen",
  "diagnose",
  "distil",
  "dual_loss",
  "export",
  "export_onnx",
  "fit",
  "gaussian_potential",
  "kantorovich_potentials",
  "load",
  "monitor",
  "plan",
  "predict_dual",
  "save",
  "sinkhorn_attention",
  "sinkhorn_duals",
  "sliced_potentials",
  "softmax_attention",
  "to_sinkhorn",
  "watch",
]


# Classes of OTT-JAX's kind: imported where they are asked for, since compiled models
# are served without OTT-JAX.
if TYPE_CHECKING:
  from asap_jax.teacher.initializer import (
    GaussianDualInitializer,
    SlicedDualInitializer,
  )
else:

  def __getattr__(name: str) -> object:
    if name in ("GaussianDualInitializer", "SlicedDualInitializer"):
      from asap_jax.teacher import initializer

      return getattr(initializer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
