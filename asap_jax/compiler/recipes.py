"""How a dual map is made: the options of one fixed operator."""

import dataclasses
from typing import Literal, get_args

from asap_jax.compiler.fitting.slicing import DirectionKind
from asap_jax.dual_map.features import COMPILED, feature_count

# What refinement descends on: KL(teacher plan || compiled plan), or minus the dual
# objective of the converged problem.
Objective = Literal["plan", "dual"]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A dual map that `asap_jax.compile` is to make in every layer, and how it is fitted.

  By default it is the operator of the paper (Tran, Milkert and Hyde, 2026, arXiv
  2605.12879) with all refinement of this package. The paper's plain form is
  `Recipe(directions="gaussian", features=("potentials",), refine_steps=0)`.

  Attributes:
    slices: directions per head; sorting along them is most of what the map costs. Of
      principal directions a head has no more than dimensions.
    closures: two-sided closures after the prediction; between them the dual is
      over-relaxed by a factor learned for each head.
    directions: how they are drawn at first; `"principal"` takes the leading directions
      of the calibration data, at the price of one more pass.
    features: kinds of features of the dual map (see `asap_jax.dual_map.features`).
    hidden: units of the network that adds to the linear map
      (`asap_jax.dual_map.network`); zero keeps the map linear, as it is without
      refinement.
    ridge: penalty relative to each feature's variance.
    refine_steps: steps of up to 32 sequences per layer; more give a closer plan. What
      is best on held-out batches is kept, so it never ends worse there than it started.
      Activations are kept in memory up to 1 GiB, and read in parts beyond. Zero keeps
      the ridge fit: the paper's plain form, and RA-OT where the teacher's iterations
      converge (see `objective`).
    objective: what refinement descends on. `"plan"` is KL(teacher plan || compiled
      plan). `"dual"` is minus the entropic dual objective of the compiled duals, which
      is that KL to the *converged* plan up to a constant (OA-OT, "Amortized Optimal
      Transport from Sliced Potentials", 2026, arXiv 2604.15114): it asks nothing of the
      teacher's iterations, and is the wrong aim where they are far from converged. With
      `features=("query",)` too, it is our form of Meta OT (Amos et al., 2022, arXiv
      2206.05262): a network that sees no slices
      (`asap_jax.compiler.fitting.objective`).

  Example:
    >>> Recipe(slices=4).closures
    1
  """

  slices: int = 8
  closures: int = 1
  directions: DirectionKind = "principal"
  features: tuple[str, ...] = COMPILED
  hidden: int = 64
  ridge: float = 1e-6
  refine_steps: int = 3000
  objective: Objective = "plan"

  def check(self, dim: int) -> None:
    """Raises ValueError unless the options make sense for heads of dimension `dim`."""
    feature_count(self.features, self.slices, dim)
    for name, least in (("closures", 1), ("refine_steps", 0), ("hidden", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
    if self.hidden == 1:
      raise ValueError("hidden=1: expected at least two units, or 0 for none")
    if not self.ridge > 0.0:
      raise ValueError(f"ridge={self.ridge}: expected a positive number")
    if self.objective not in get_args(Objective):
      raise ValueError(f"objective={self.objective!r}: expected 'plan' or 'dual'")
