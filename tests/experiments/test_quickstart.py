"""The quickstart from end to end on a few steps."""

import dataclasses
import json

import pytest

from asap_jax.compiler import measuring
from experiments import quickstart
from experiments.common.digits import Dataset, Split, digits


def test_quickstart_refuses_unknown_attentions(tmp_path, capsys):
  with pytest.raises(SystemExit):
    quickstart.main(["--out", str(tmp_path / "out"), "--attention", "lott"])
  assert "name='lott': expected one of" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_runs_from_end_to_end(tmp_path, monkeypatch):
  def few_digits(seed):
    return Dataset(*(Split(*(array[:256] for array in part)) for part in digits(seed)))

  monkeypatch.setattr(quickstart, "digits", few_digits)
  monkeypatch.setattr(
    quickstart, "MODEL", dataclasses.replace(quickstart.MODEL, layers=1)
  )
  # Rows are measured apart from the report, whose other cuts take long to compile.
  monkeypatch.setattr(measuring, "CUTS", (1,))
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
  ]
  # Of other weights: their plans are not the teacher's.
  assert "tv" not in rows["lot"]
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  # All of the teacher's iterations in another form.
  assert rows["sinkhorn@20"]["tv"] == pytest.approx(0.0, abs=1e-5)
  assert rows["sinkhorn@20"]["accuracy"] == rows["sinkhorn"]["accuracy"]
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  assert rows["asap"]["restored_identical"] is True
  assert (out / "plans.png").stat().st_size > 10_000
  assert (out / "compiled" / "manifest.json").is_file()
