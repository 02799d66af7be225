"""Options of a fixed operator, and which of them are refused."""

import dataclasses

import pytest

from asap_jax import Recipe
from asap_jax.dual_map.features import KINDS

DIM = 8


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"closures": 0}, r"^closures=0: expected at least 1$"),
    ({"closures": -2}, r"^closures=-2: expected at least 1$"),
    ({"refine_steps": -1}, r"^refine_steps=-1: expected at least 0$"),
    ({"hidden": -1}, r"^hidden=-1: expected at least 0$"),
    ({"hidden": 1}, r"^hidden=1: expected at least two units, or 0 for none$"),
    ({"features": ()}, r"^features=\(\): expected some of .*in that order$"),
    ({"features": ("sorted",)}, r"^features=\('sorted',\): expected some of"),
    ({"features": KINDS[1::-1]}, r"^features=\('query', 'potentials'\): expected"),
    ({"features": ("query", "query")}, r"^features=\('query', 'query'\): expected"),
  ],
  ids=str,
)
def test_an_option_that_makes_no_sense_is_named(options, message):
  with pytest.raises(ValueError, match=message):
    Recipe(**options).check(DIM)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_objective_is_named():
  with pytest.raises(ValueError, match=r"^objective='kl': expected 'plan' or 'dual'$"):
    Recipe(objective="kl").check(DIM)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"directions": "gaussian", "features": ("potentials",), "refine_steps": 0},
    {"closures": 1, "hidden": 0},
    {"hidden": 2},
    {"objective": "dual"},
    *({"features": (kind,)} for kind in KINDS),
  ],
  ids=str,
)
def test_the_least_that_makes_sense_is_accepted(options):
  Recipe(**options).check(DIM)


def test_a_recipe_stays_as_it_was_checked():
  recipe = Recipe()
  with pytest.raises(dataclasses.FrozenInstanceError):
    recipe.closures = 0
