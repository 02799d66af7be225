"""The comparison of starts, from end to end on a few small problems."""

import json

import pytest

from experiments.initializers import __main__ as initializers
from experiments.initializers.clouds import FAMILIES


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
    "gaussian, entropic",
    "gaussian, entropic, low rank",
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
  tolerances = (1e-3, 1e-5)
  assert [(row["family"], row["tolerance"], row["method"]) for row in rows] == [
    (family, tolerance, method)
    for family, methods in ((learned_on, plain + learned), (weighted, plain))
    for tolerance in tolerances
    for method in methods
  ]
  first = {(row["family"], row["method"]): row["first_error"] for row in rows}
  for family in (learned_on, weighted):
    for start in ("sliced", "gaussian, entropic"):
      assert first[family, start] < 0.5 * first[family, "default"]
  for row in rows:
    assert row["converged"] == 1.0
    assert 0.0 < row["rate"] < 1.0
    if row["method"] == "default":
      assert row["of_default"] == 1.0
