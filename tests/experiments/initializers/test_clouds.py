"""Families of problems."""

import numpy as np
import pytest

from experiments.initializers.clouds import FAMILIES

POINTS = 16


@pytest.mark.parametrize("name", FAMILIES)
def test_problems_are_fresh_and_depend_on_the_seed_alone(name):
  draw = FAMILIES[name].problems
  fitted, again, other, tested = (
    draw(3, POINTS, seed, test=test)
    for seed, test in ((0, False), (0, False), (1, False), (0, True))
  )
  for one, two in zip(fitted, again, strict=True):
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one.shape[:2], (3, POINTS))
    assert np.isfinite(one).all()
  for unlike in (other, tested):
    assert not np.isclose(fitted.x[:, :1], unlike.x).all(-1).any()
  for masses in (fitted.a, fitted.b):
    np.testing.assert_allclose(masses.sum(-1), 1.0, rtol=1e-6)
    absent = POINTS // 4 if FAMILIES[name].weighted else 0
    np.testing.assert_array_equal((masses == 0).sum(-1), absent)


def test_logits_have_the_deviation_asked_for():
  for name, deviation in (("modest", 3.0), ("sharp", 12.0)):
    clouds = FAMILIES[f"attention, {name} logits"].problems(16, 64, 0, test=False)
    logits = np.einsum("bnd,bmd->bnm", clouds.x, clouds.y)
    assert 0.5 * deviation < logits.std() < 2.0 * deviation
