"""The command of `experiments.downstream`, from end to end."""

import argparse
import json

import numpy as np
import pytest
from helpers.small_training import PRESET, task

import asap_jax
from experiments.common import replacements
from experiments.datasets.prepare import Prepared
from experiments.downstream import __main__ as downstream
from experiments.downstream import data as sources
from experiments.downstream import evaluation, seeds


def call(out, *options):
  arguments = ["--dataset", "news", "--out", out, "--slices", 2, *options]
  downstream.main([str(argument) for argument in arguments])


@pytest.fixture
def small(monkeypatch):
  for module in (downstream, sources):
    monkeypatch.setattr(module, "load_task", lambda name, **_: task(name))
  monkeypatch.setattr(downstream, "preset_of", lambda *_: PRESET)
  monkeypatch.setattr(seeds, "REPEATS", 3)
  # Less to compile: one size of batches, and few methods.
  monkeypatch.setattr(sources, "BATCH", 16)
  for name, value in (
    ("CUTS", (1,)),
    ("COMPILED", ("ridge", "asap")),
    ("SHIFTED", ("softmax_swap", "asap")),
  ):
    monkeypatch.setattr(evaluation, name, value)


def compile_double(teacher, batches, operator, *, seed):
  """In the place of `asap_jax.compile`: Sinkhorn cut to four iterations."""
  assert [batch["ids"].shape for batch in batches] == [(16, 8)] * 2
  assert all("label" not in batch for batch in batches)
  model = replacements.cut_sinkhorn(teacher, 4)
  seconds = 9 if operator is None else operator.refine_steps
  layers = [argparse.Namespace(chosen="sinkhorn@4")]
  return model, argparse.Namespace(seconds=seconds, layers=layers)


@pytest.mark.slow
def test_everything_is_measured_and_resumed(tmp_path, small, capsys, monkeypatch):
  monkeypatch.setattr(asap_jax, "compile", compile_double)
  monkeypatch.setattr(evaluation, "COMPILED", ("ridge", "asap", "best"))
  out = tmp_path / "out"
  given = ("--seeds", 0, "--test-limit", 32, "--shift-dataset", "other")
  call(out, *given)
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  replaced = ["softmax_swap", "sinkhorn@1", "ridge", "asap", "best"]
  assert list(rows) == ["softmax", "sinkhorn", *replaced, "linear"]
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  for name in replaced:
    row = rows[name]
    assert row["tv"] > 0
    assert row["tv"] == pytest.approx(np.mean([each["tv"] for each in row["layers"]]))
    assert row["n_test"] == 32
    assert "recovered" in row or name == "softmax_swap"
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  # The steps of refinement, and 9 for a choice by measurement.
  assert [rows[name]["compile_seconds"] for name in replaced[2:]] == [0, 2, 9]
  assert [rows[name].get("slices") for name in replaced[2:]] == [2, 2, None]
  # By seed and layer.
  assert rows["best"]["chosen"] == [["sinkhorn@4"]]
  assert rows["sinkhorn"]["best_step"] in (3, 6)
  shifted = [row for row in results["rows"] if "shift" in row]
  assert [(row["shift"], row["method"]) for row in shifted] == [
    ("half length", "sinkhorn"),
    ("half length", "softmax_swap"),
    ("half length", "asap"),
    ("compiled on other", "ridge"),
    ("compiled on other", "asap"),
  ]
  assert results["config"]["seeds"] == [0]
  assert results["config"]["preset_values"]["steps"] == 6
  seed = out / "news" / "seed0"
  assert (seed / "sinkhorn" / "metrics.csv").read_text().count("\n") == 3
  assert (seed / "asap" / "compiled" / "manifest.json").is_file()
  for name in ("accuracy.png", "frontier.png"):
    assert (out / name).stat().st_size > 5_000

  # Resumed after its end it measures nothing anew.
  monkeypatch.setattr(seeds, "train", None)
  (out / "results.json").unlink()
  call(out, *given, "--resume")
  assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]
  assert "half length" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_models_are_closer_than_a_cut(tmp_path, small):
  out = tmp_path / "out"
  call(out, "--seeds", "0,1", "--test-limit", 32, "--attention", "lot")
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  assert rows["asap"]["slices"] == 2
  assert all(len(row["accuracies"]) == 2 for n, row in rows.items() if n != "linear")
  assert "lot" in rows


@pytest.mark.slow
def test_models_that_are_only_trained(tmp_path, small, capsys):
  out = tmp_path / "out"
  given = ("--seeds", "0,1", "--test-limit", 32, "--train-only", "--attention")
  call(out, *given, "gaussian@2", "amortized")
  rows = {row["method"]: row for row in results_of(out)}
  assert list(rows) == ["softmax", "sinkhorn", "gaussian@2", "amortized", "linear"]
  del rows["linear"]
  for row in rows.values():
    assert len(row["accuracies"]) == 2
    assert len(row["column_error_at_checks"]) == 2
    assert "tv" not in row
  errors = {name: row["column_error"] for name, row in rows.items()}
  assert errors["sinkhorn"] < errors["gaussian@2"] < errors["softmax"]
  assert "Inputs of another kind" not in capsys.readouterr().out
  assert not (out / "frontier.png").exists()


def results_of(out):
  return json.loads((out / "results.json").read_text())["rows"]


def message(capsys, out, *options):
  with pytest.raises(SystemExit):
    call(out, *options)
  return " ".join(capsys.readouterr().err.split())


def test_a_run_is_resumed_with_its_own_options(tmp_path, small, capsys, monkeypatch):
  out = tmp_path / "out"
  monkeypatch.setattr(downstream, "load", lambda *_: 1 / 0)
  # Killed early, it can be resumed, even where nothing was written yet.
  for options in (("--resume",), ("--resume", "--data-dir", tmp_path)):
    with pytest.raises(ZeroDivisionError):
      call(out, "--seeds", 0, *options)
    told = f"Nothing to resume in {out}: a new run starts" in capsys.readouterr().out
    assert told == (len(options) == 1)
  before = (out / "options.json").read_text()
  found = message(capsys, out, "--resume", "--seeds", "0,1")
  assert "--seeds is [0, 1]: the run in" in found
  assert "had [0]; resume it with its own options" in found
  # Without --resume nothing is overwritten, whatever the options.
  assert "name a new directory" in message(capsys, out, "--seeds", 0)
  assert (out / "options.json").read_text() == before
  (out / "options.json").rename(out / "else")
  assert "name a new directory" in message(capsys, out, "--resume", "--seeds", 0)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (("--attention", "espp"), "did you mean 'esp'?"),
    (("--seeds", "a"), "--seeds: expected seeds as 0,1,2: 'a': expected"),
    (("--seeds", "-1"), "expected an integer from 0 to 4294967295"),
    (("--steps", "0"), "--steps: '0': expected an integer from 1 up"),
    (("--refine-steps", "-1"), "expected an integer from 0 up"),
    (("--preset", "huge"), "invalid choice: 'huge'"),
  ],
)
def test_options_that_make_no_sense(tmp_path, small, capsys, options, expected):
  assert expected in message(capsys, tmp_path, *options)


def test_a_task_that_cannot_be_read(tmp_path, capsys, monkeypatch):
  def fails(name, **_):
    raise ValueError(f"{name}: not a data set")

  monkeypatch.setattr(downstream, "load_task", fails)
  assert "--dataset: news: not a data set" in message(capsys, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_shift_that_cannot_be_read(tmp_path, small, capsys, monkeypatch):
  def fails(name, task, data_dir):
    raise RuntimeError(f"{name} is not prepared")

  monkeypatch.setattr(downstream, "foreign_task", fails)
  found = message(capsys, tmp_path / "out", "--shift-dataset", "other")
  assert "--shift-dataset: other is not prepared" in found
  assert not (tmp_path / "out").exists()


def test_peers_whose_loss_is_not_finite_are_left_out(tmp_path, monkeypatch, capsys):
  def fails(model, *_, directory, **__):
    raise FloatingPointError(f"{directory.name} is lost")

  monkeypatch.setattr(seeds, "train", fails)
  prepared = Prepared("news", "text", {}, {}, 3, (), vocabulary_size=64, length=8)
  given = {"ids": np.zeros((9, 8), int), "label": np.zeros(9, int)}
  data = sources.Data(prepared, given, given)
  assert seeds.train_all(["esp"], data, PRESET, 0, tmp_path) == ({}, {})
  assert "esp is lost" in capsys.readouterr().out
  with pytest.raises(FloatingPointError, match="sinkhorn is lost"):
    seeds.train_all(["sinkhorn"], data, PRESET, 0, tmp_path)
