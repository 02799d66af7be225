"""From a trained model to a compiled one.

`api` is `asap_jax.compile`. In the order of its steps: `sites` finds the Sinkhorn
attentions, `recording` watches them on calibration batches, `fitting` fits their dual
maps, `fidelity` and `measuring` compare operators with the teacher, `selection` takes
the fastest that is close enough, and `report` says what was gained. `distillation`
trains all maps together afterwards; `saving` keeps a compiled model.
"""

from asap_jax.compiler.api import Compiled, compile
from asap_jax.compiler.distillation import Distilled, distil
from asap_jax.compiler.report import Alternative, LayerReport, Report
from asap_jax.compiler.saving import load, save

__all__ = [
  "Alternative",
  "Compiled",
  "Distilled",
  "LayerReport",
  "Report",
  "compile",
  "distil",
  "load",
  "save",
]
