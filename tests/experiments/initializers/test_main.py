"""The comparison of Sinkhorn's starts, from end to end on a few small problems."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.initializers import __main__ as initializers
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


def test_ott_gaussian_start_serves_both_costs():
  # More points than dimensions, for Gaussians that are not flat.
  clouds = FAMILIES["attention, modest logits"].problems(3, 64, 0, test=True)
  clouds = jax.tree.map(jnp.asarray, clouds)
  start = initializers.GaussianInitializer()
  product, squared = (
    initializers._started(clouds, start, epsilon, cost)
    for epsilon, cost in ((1.0, "product"), (2.0, "squared"))
  )
  expected = (squared - jnp.sum(clouds.x**2, -1)) / 2
  np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)
  # The two problems have the same plan, so that a start is worth the same in both.
  counts = [
    initializers._iterated(clouds, f, epsilon, cost).iterations
    for f, epsilon, cost in ((product, 1.0, "product"), (squared, 2.0, "squared"))
  ]
  np.testing.assert_array_equal(*counts)


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch):
  out = tmp_path / "out"
  learned_on, weighted = "attention, modest logits", "mixtures, 2-D, masses"
  one = FAMILIES[weighted]._replace(epsilons=(0.1,))
  monkeypatch.setitem(FAMILIES, weighted, one)
  sizes = ["--points", "24", "--tests", "3", "--fitted", "64", "--steps", "2"]
  families = ["--families", learned_on, weighted]
  initializers.main(["--out", str(out), *sizes, *families])
  results = json.loads((out / "results.json").read_text())
  rows = results["rows"]
  plain = [
    "default",
    "gaussian",
    "sorting",
    "sliced, random",
    "sliced, principal",
    "sliced, not entropic",
    "sliced",
  ]
  learned = [
    "regression",
    "regression, all features",
    "objective",
    "objective, no slices",
    "objective, all features, network",
  ]
  assert [row["method"] for row in rows] == plain + learned + plain
  assert [row["family"] for row in rows] == 12 * [learned_on] + 7 * [weighted]
  first = {(row["family"], row["method"]): row["first_error"] for row in rows}
  for family in (learned_on, weighted):
    assert first[family, "sliced"] < 0.5 * first[family, "default"]
  for row in rows:
    assert row["converged"] == 1.0
    assert 0.0 < row["rate"] < 1.0
    if row["method"] == "default":
      assert row["of_default"] == 1.0
