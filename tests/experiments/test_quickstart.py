"""The quickstart from end to end on a few steps."""

import argparse
import dataclasses
import json

import pytest

from asap_jax.compiler import measuring, selection
from experiments import quickstart
from experiments.common.digits import Dataset, Split, digits


def test_quickstart_refuses_unknown_attentions(tmp_path, capsys):
  with pytest.raises(SystemExit):
    quickstart.main(["--out", str(tmp_path / "out"), "--attention", "lott"])
  assert "name='lott': expected one of" in capsys.readouterr().err


def concluded(*chosen, milliseconds=5.0):
  """The last line, by what was chosen in each layer and the time of the best model."""
  layers = [argparse.Namespace(chosen=name, iterations=20) for name in chosen]
  report = argparse.Namespace(layers=layers, target_tv=0.05)
  rows = {
    "sinkhorn": {"milliseconds": 20.0},
    "sinkhorn@20": {"milliseconds": 8.0},
    "best": {"milliseconds": milliseconds, "tv": 0.0304},
  }
  return quickstart.conclusion(report, rows)


@pytest.mark.parametrize("chosen", [("half", "half"), ("half", "sinkhorn@20")])
def test_it_ends_with_what_was_gained(chosen):
  assert concluded(*chosen) == (
    "With the best operators the model is 4.0 times as fast as with OTT-JAX's "
    "iterations and 1.60 times as fast as in its fastest exact form, at TV 0.030 on "
    "test images."
  )
  # A loss would be told as one.
  assert "0.80 times as fast as in" in concluded(*chosen, milliseconds=10.0)


@pytest.mark.parametrize("chosen", ["sinkhorn@20", "teacher"])
def test_it_says_so_where_nothing_beats_the_exact_iterations(chosen):
  assert concluded(chosen, "sinkhorn@20", milliseconds=8.0) == (
    "The exact iterations stay, for nothing faster comes within TV 0.05 of them here: "
    "the model is 2.5 times as fast as with OTT-JAX's by their fastest form alone."
  )


@pytest.mark.slow
def test_quickstart_runs_from_end_to_end(tmp_path, monkeypatch):
  def few_digits(seed):
    return Dataset(*(Split(*(array[:256] for array in part)) for part in digits(seed)))

  monkeypatch.setattr(quickstart, "digits", few_digits)
  monkeypatch.setattr(
    quickstart, "MODEL", dataclasses.replace(quickstart.MODEL, layers=1)
  )
  # Rows are measured apart from the report, whose other cuts take long to compile.
  for module in (measuring, selection):
    monkeypatch.setattr(module, "CUTS", (1,))
  monkeypatch.setattr(selection, "STARTS", ())
  out = tmp_path / "out"
  names = ["lot", "sinkhorn", "sinkhorn@2"]
  quickstart.run(out, seed=0, steps=3, refine_steps=2, attentions=names)
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"]}
  assert list(rows) == [
    "softmax",
    "lot",
    "sinkhorn@2, trained",
    "softmax_swap",
    "sinkhorn",
    "sinkhorn@20",
    "sinkhorn@1",
    "sinkhorn@2",
    "sinkhorn@3",
    "sinkhorn@5",
    "ridge",
    "asap",
    "best",
  ]
  # Of other weights: their plans are not the teacher's.
  assert "tv" not in rows["lot"]
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  # All of the teacher's iterations in another form.
  assert rows["sinkhorn@20"]["tv"] == pytest.approx(0.0, abs=1e-5)
  assert rows["sinkhorn@20"]["accuracy"] == rows["sinkhorn"]["accuracy"]
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  assert rows["asap"]["restored_identical"] is True
  assert rows["best"]["tv"] <= 0.06
  assert len(rows["best"]["chosen"]) == 1  # one layer
  assert "chosen" not in rows["asap"]
  assert (out / "plans.png").stat().st_size > 10_000
  assert (out / "compiled" / "manifest.json").is_file()
