"""The entropic c-transform: from a dual of one side to the plan of both.

`entropic` has the transform, the two-sided closure, its repetition and the plan, in the
log domain and as plain as can be; `scaling_domain` computes the same plan with one
exponential.
"""

from asap_jax.c_transform.entropic import (
  Duals,
  apply_plan,
  c_transform,
  closure,
  closures,
  plan,
)
from asap_jax.c_transform.scaling_domain import ScaledPlan, scaled_plan

__all__ = [
  "Duals",
  "ScaledPlan",
  "apply_plan",
  "c_transform",
  "closure",
  "closures",
  "plan",
  "scaled_plan",
]
