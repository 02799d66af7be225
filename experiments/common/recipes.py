"""Recipes that several experiments compile by."""

from typing import Any

import asap_jax
from asap_jax.compiler.report import Report


def plain_recipe(slices: int) -> asap_jax.Recipe:
  """The paper's plain form: random slices, potentials alone, no refinement."""
  return asap_jax.Recipe(
    slices, directions="gaussian", features=("potentials",), refine_steps=0
  )


def about_compiling(recipe: asap_jax.Recipe | None, report: Report) -> dict[str, Any]:
  """Entries of a row: of the recipe, or what was chosen in each layer without one."""
  own: dict[str, Any] = {"chosen": [layer.chosen for layer in report.layers]}
  if recipe is not None:
    sliced = {"potentials", "transport"} & set(recipe.features)
    own = {"slices": recipe.slices if sliced else 0, "closures": recipe.closures}
  return own | {"compile_seconds": report.seconds}
