"""Matching a stereo pair: what is right, and the command from end to end."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import asap_jax
from experiments.matching import __main__ as matching
from experiments.matching import methods
from experiments.matching.pair import Keypoints, Pair, moved_by


def known(count=40, seed=0):
  """A pair whose right keypoints are the left ones moved by 5 columns, in part."""
  random = np.random.default_rng(seed)
  places = random.permutation(np.stack([np.arange(100) * 4.0, np.full(100, 50.0)], -1))
  descriptors = random.normal(size=(100, 16)).astype(np.float32)
  descriptors /= np.linalg.norm(descriptors, axis=-1, keepdims=True)
  left = Keypoints(places[:count], descriptors[:count])
  right = Keypoints(places[10 : count + 10] - [0, 5], descriptors[10 : count + 10])
  return Pair(left, right, places[:count] - [0, 5], rows=400)


def test_what_is_one_and_what_has_no_partner():
  pair = known()
  assert pair.same.sum() == 30
  wanted = pair.targets
  assert wanted.shape == (41, 41)
  np.testing.assert_array_equal(wanted[:-1].sum(1), 1.0)
  np.testing.assert_array_equal(wanted[:, :-1].sum(0), 1.0)
  assert wanted[:10, -1].all()
  assert not wanted[10:-1, -1].any()
  upper, lower = pair.half(lower=False), pair.half(lower=True)
  assert upper.left.positions[:, 0].max() < 200 <= lower.right.positions[:, 0].min()
  assert upper.same.sum() + lower.same.sum() == 30


def test_two_keypoints_in_one_place_are_no_two_pairs():
  place = np.zeros((2, 2))
  both = Keypoints(place, np.eye(2, dtype=np.float32))
  targets = Pair(both, both, place, rows=2).targets
  assert targets[:-1, :-1].sum() == 1
  assert not targets[:-1, -1].any()


def test_disparity_is_known_or_nothing_is():
  disparity = np.array([[1.0, np.inf], [2.0, np.nan]])
  moved = moved_by(disparity, np.array([[0.0, 0.4], [0.0, 1.0], [1.3, 0.0], [1, 1]]))
  np.testing.assert_allclose(moved[[0, 2]], [[0.0, -0.6], [1.3, -2.0]])
  assert np.isnan(moved[[1, 3], 1]).all()


def test_scores_count_matches_without_a_partner():
  same = np.array([[[True, False, False], [False, False, False], [False, True, False]]])
  plan = np.full((1, 4, 4), 0.01)
  plan[0, 0, 0] = plan[0, 1, 2] = 0.9  # right, and of a keypoint that has none
  plan[0, 2, 3] = 0.9  # left out
  found = matching.scores(jnp.log(plan), same, 0.2)
  assert found == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5})
  errors = matching.column_errors(plan)
  np.testing.assert_allclose(errors[0], [0.07, 0.96, 0.07, 1 - 0.93 / 3], atol=1e-6)


@pytest.mark.slow
def test_the_command_learns_fits_and_times(tmp_path, monkeypatch):
  monkeypatch.setattr(matching, "load_pair", known)
  monkeypatch.setattr(methods, "CUTS", {"zero": (1,), "dustbin": (1,)})
  monkeypatch.setattr(methods, "COMPILED", (1,))
  monkeypatch.setattr(methods, "_MAP", methods._MAP | {"features": ("query",)})
  own, exact = asap_jax.fit, asap_jax.compiler.Sinkhorn(5)
  monkeypatch.setattr(
    asap_jax,
    "fit",
    lambda calls, operator, **options: own(calls, operator or exact, **options),
  )
  given = ["--points", "16", "--fitted", "4", "--tests", "2", "--steps", "5"]
  given += ["--sizes", "16", "32", "--repeats", "3", "--out", str(tmp_path / "out")]
  matching.main(given)
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"]}
  expected = ["teacher", "exact", "zero@1", "dustbin@1", "asap@1", "best", "amortized"]
  assert list(rows) == expected
  assert rows["exact"]["tv"] < 1e-4
  assert rows["exact"]["f1"] == rows["teacher"]["f1"] > 0.5
  assert rows["dustbin@1"]["tv"] < rows["zero@1"]["tv"]
  for row in rows.values():
    assert {"milliseconds_16", "milliseconds_32"} <= row.keys()
  for bad in (["--fitted", "5"], ["--points", "60"], ["--sizes", "99"]):
    with pytest.raises(SystemExit):
      matching.main(["--out", str(tmp_path / "other"), *bad])
