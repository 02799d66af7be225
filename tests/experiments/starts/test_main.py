"""Starts compared: closeness, cost, time to an error, and training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles

from asap_jax.compiler.operators import Sinkhorn
from experiments.starts import __main__ as starts
from experiments.starts import cost, methods, reach, replaced

SMALL = {"softmax_swap", "sinkhorn@1", "sinkhorn@1000", "gaussian@1"}


def test_errors_are_those_of_the_iterations():
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 2, 12, 3))
  errors = reach._errors(2.0 * query, key, "zero")
  assert len(errors) >= methods.ITERATIONS
  expected = []
  for head in range(2):
    logits = np.float64(2.0 * query[0, head]) @ np.float64(key[0, head]).T
    f, g = oracles.closures(logits, np.zeros(12), 3)
    columns = np.exp(logits + f[:, None] + g).sum(0)
    expected.append(np.abs(columns - 1.0).mean())
  np.testing.assert_allclose(errors[2], np.mean(expected), rtol=1e-4)


def test_fewest_iterations():
  assert reach._least([0.5, 0.09, 0.02], 0.1) == 2
  assert reach._least([0.5, 0.09, 0.02], 0.03) == 3
  assert reach._least([0.5, 0.2], 0.1) is None


def test_sequences_are_joined_in_order(monkeypatch):
  monkeypatch.setattr(reach, "TOKENS", 12)
  points = jnp.arange(5 * 2 * 3).reshape(5, 2, 3, 1)
  joined = reach.joined(points, 6)
  assert joined.shape == (2, 2, 6, 1)
  np.testing.assert_array_equal(joined[0, 1, :, 0], [3, 4, 5, 9, 10, 11])


@pytest.mark.slow
def test_small_run(tmp_path, monkeypatch):
  chosen = {k: v for k, v in methods.operators().items() if k in SMALL}
  chosen["sinkhorn@1000"] = Sinkhorn(100)
  monkeypatch.setattr(replaced, "operators", lambda: chosen)
  monkeypatch.setattr(cost, "SHAPES", ((2, 1, 8, 4),))
  monkeypatch.setattr(reach, "TOKENS", 128)
  monkeypatch.setattr(starts.trained, "NAMES", ("softmax", "gaussian@1"))
  out = tmp_path / "out"
  small = ["--steps", "3", "--seeds", "0", "--test-limit", "8", "--repeats", "3"]
  starts.main(["--out", str(out), "--lengths", "64", *small])
  found = json.loads((out / "results.json").read_text())
  parts = {row["part"] for row in found["rows"]}
  assert parts == set(starts.PARTS)
  assert (out / "reach.png").is_file()
  assert (out / "replaced.png").is_file()
  rows = {row["method"]: row for row in found["rows"] if row["part"] == "replaced"}
  assert rows["sinkhorn@1000"]["tv_converged"] < rows["sinkhorn@1"]["tv_converged"]
  assert rows["sinkhorn@1"]["tv"] > 0
  padded = [row for row in found["rows"] if row.get("padded")]
  assert {row["method"] for row in padded} >= {"softmax", "gaussian_low_rank"}
  models = [row for row in found["rows"] if row["part"] == "trained"]
  assert len(models[0]["column_errors"]) == starts.trained.MODEL.layers
  # Softmax at the end of the run, on fewer images.
  at_end = models[0]["column_error_at_checks"][-1]
  assert at_end == pytest.approx(np.mean(models[0]["column_errors"]), rel=0.2)


def test_teacher_needs_all_of_its_options(tmp_path, capsys):
  with pytest.raises(SystemExit):
    starts.main(["--out", str(tmp_path / "out"), "--heads", "2"])
  assert "go together" in capsys.readouterr().err
