"""The comparison of peers on a few steps."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from experiments.common import train
from experiments.common.attentions import build_attention
from experiments.common.digits import Dataset, Split, digits
from experiments.peers import __main__ as peers
from experiments.peers.display import displayed


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("sinkhron", r"name='sinkhron': expected one of .*did you mean 'sinkhorn'\?"),
    ("sinkhorn@0", r"name='sinkhorn@0': expected sinkhorn@k"),
  ],
)
def test_names_that_cannot_be_trained_are_refused(name, message, tmp_path, capsys):
  with pytest.raises(ValueError, match=message):
    build_attention(name, heads=2, dim=4, layer=1, rngs=nnx.Rngs(0))
  with pytest.raises(SystemExit):
    peers.main(["--out", str(tmp_path / "new"), "--attentions", name])
  assert f"name='{name}'" in capsys.readouterr().err


def test_compiled_forms_need_their_teacher(tmp_path, capsys):
  with pytest.raises(SystemExit):
    peers.main(["--out", str(tmp_path / "new"), "--attentions", "softmax", "asap"])
  assert "asap is made of sinkhorn: name that too" in capsys.readouterr().err


def _small(monkeypatch):
  def few_digits(seed):
    return Dataset(*(Split(*(array[:128] for array in part)) for part in digits(seed)))

  small = dataclasses.replace(peers.MODEL, width=16)
  monkeypatch.setattr(peers, "digits", few_digits)
  monkeypatch.setattr(peers, "MODEL", small)


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
  _small(monkeypatch)
  out, names = tmp_path / "out", ["softmax", "sinkhorn", "sinkhorn_scaling"]
  options = "--seeds 3 --steps 2 --layers 1 --attentions".split()
  peers.main(["--out", str(out), *options, *names])
  results = json.loads((out / "results.json").read_text())
  assert results["experiment"] == "peers"
  assert results["config"]["seeds"] == [3]
  assert results["config"]["width"] == 16
  rows = {row["method"]: row for row in results["rows"]}
  assert list(rows) == names
  for row in rows.values():
    assert row["row_error"] < 1e-5
    assert row["accuracies"] == [row["accuracy"]]
    assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert row["step_milliseconds"] > 0
    assert row["temp_bytes"] < row["step_temp_bytes"]
    assert len(row["rank_residual"]) == 2
    assert (row["n_test"], row["length"]) == (128, 64)
  assert rows["softmax"]["ratio_to_softmax"] == 1.0
  # The same plans, in another form.
  two = [rows[name] for name in names[1:]]
  assert two[0]["column_error"] < 1e-3 < rows["softmax"]["column_error"]
  assert two[0]["accuracy"] == two[1]["accuracy"]
  np.testing.assert_allclose(
    two[0]["rank_residual"], two[1]["rank_residual"], rtol=1e-4
  )
  printed = capsys.readouterr().out
  assert (out / "claims.txt").read_text() in printed
  assert "Wrote" in printed
  assert (out / "peers.png").stat().st_size > 10_000
  assert [row["method"] for row in displayed(results["rows"])] == names


def test_training_that_fails_leaves_its_seed_out(tmp_path, monkeypatch, capsys):
  def fails(model, split, config, seed, label, augment, look):
    if "est" in label:
      raise FloatingPointError(f"{label}: training loss is nan after step 2")

  _small(monkeypatch)
  monkeypatch.setattr(train, "train_classifier", fails)
  data = digits(0).train
  found = train.train_encoders(["est", "lot"], data, peers.MODEL, 0, 2)
  assert list(found) == ["lot"]
  assert "est, seed 0: training loss is nan" in capsys.readouterr().out
  with pytest.raises(FloatingPointError, match="est, seed 0"):
    train.train_encoders(["est"], data, peers.MODEL, 0, 2, needed=("est",))
  assert peers.derived(["asap"], None, data, 0, 2) == {}
  with pytest.raises(SystemExit, match="No model could be trained"):
    peers.run(tmp_path, ["est"], seeds=[0], steps=2)


@pytest.mark.slow
def test_the_compiled_teacher_has_a_row(tmp_path, monkeypatch):
  _small(monkeypatch)
  names = ["sinkhorn", "asap"]
  rows = peers.run(tmp_path, names, seeds=[0], steps=2, layers=1, refine_steps=2)
  assert [row["method"] for row in rows] == names
  assert rows[1]["row_error"] < 1e-5
  assert rows[1]["column_error"] < 0.1
