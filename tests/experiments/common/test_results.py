"""Results: written whole, pooled over seeds, printed."""

import argparse
import json
import os
import pathlib

import numpy as np
import pytest

from experiments.common.results import (
  options_of,
  pooled,
  pooled_row,
  print_rows,
  with_spread,
  write_results,
  write_whole,
)


def test_results_are_replaced_whole(tmp_path):
  for value in (1.0, 2.0):
    rows = [{"method": "asap", "tv": value}]
    path = write_results(tmp_path, "test", {"seed": 0}, rows, {"total": 1.0})
  assert json.loads(path.read_text())["rows"] == rows
  assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_printed_tables_lose_no_figure(capsys):
  row = {f"a_quantity_{index}": index + 0.1234 for index in range(30)}
  print_rows([{"method": "asap", **row}, {"method": "sinkhorn"}], "wide")
  printed = capsys.readouterr().out
  assert "…" not in printed
  for value in row.values():
    assert f"{value:.4f}" in printed


def test_files_are_written_whole(tmp_path, monkeypatch):
  path = tmp_path / "deep" / "file"
  write_whole(path, "first")

  def fails(*_):
    raise OSError("no room")

  monkeypatch.setattr(os, "replace", fails)
  with pytest.raises(OSError, match="no room"):
    write_whole(path, "second")
  assert path.read_text() == "first"
  assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_files_follows_from_the_umask(tmp_path, umask, mode):
  before = os.umask(umask)
  try:
    write_whole(tmp_path / "file", "")
  finally:
    os.umask(before)
  assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_accuracies_show_their_spread():
  row = {"accuracy": 0.51234}
  assert with_spread(row) == "0.5123"
  assert with_spread(row | {"accuracy_std": 0.0456}, 2) == "0.51 ± 0.05"


def test_options_are_what_json_holds():
  args = argparse.Namespace(out=pathlib.Path("a/b"), seeds=[0, 1], limit=None)
  assert options_of(args) == {"out": "a/b", "seeds": [0, 1], "limit": None}


def test_seeds_are_pooled():
  layers = [{"layer": "a", "tv": 0.2}, {"layer": "b", "tv": 0.4}]
  more = [{"layer": "a", "tv": 0.4}, {"layer": "b", "tv": 0.0}]
  one = {"method": "asap", "accuracy": 0.5, "n_test": 10, "layers": layers}
  two = {"method": "asap", "accuracy": 0.7, "n_test": 10, "layers": more}
  peer = {"method": "esp", "accuracy": 0.4, "recovered": None}
  shift = {"method": "asap", "shift": "half length", "accuracy": 0.1}
  found = pooled([[one, peer, shift], [two, shift]])
  assert found[0] == {
    "method": "asap",
    "accuracy": pytest.approx(0.6),
    "accuracy_std": pytest.approx(np.sqrt(0.02)),
    "accuracies": [0.5, 0.7],
    "n_test": 10,
    "layers": [
      {"layer": "a", "tv": pytest.approx(0.3)},
      {"layer": "b", "tv": pytest.approx(0.2)},
    ],
  }
  assert found[1]["accuracies"] == [0.4, None]
  assert found[1]["recovered"] is None
  assert "accuracy_std" not in found[1]
  assert found[2]["accuracies"] == [0.1, 0.1]
  assert [row["method"] for row in found] == ["asap", "esp", "asap"]


def test_choices_are_listed_by_seed():
  # Words have no mean, and seeds may choose differently.
  best = {"method": "best", "accuracy": 0.5, "compile_seconds": 3.0}
  one = best | {"chosen": ["half", "sinkhorn@20"]}
  two = best | {"chosen": ["half", "half"], "compile_seconds": 5.0}
  (found,) = pooled([[one], [two]])
  assert found["chosen"] == [["half", "sinkhorn@20"], ["half", "half"]]
  assert found["compile_seconds"] == pytest.approx(4.0)
  assert pooled_row([None, one])["chosen"] == [None, ["half", "sinkhorn@20"]]


def test_seeds_are_pooled_and_those_that_failed_named():
  each = {"row_error": 0.1, "column_error": 0.2, "attention_sink_share": 0.5}
  each |= {"rank_residual": [1.0, 0.5], "n_test": 7, "accuracy": 0.5}
  other = each | {"accuracy": 0.8, "row_error": 0.3, "rank_residual": [0.0, 0.1]}
  row = pooled_row([each, None, other])
  assert row["accuracies"] == [0.5, None, 0.8]
  assert row["accuracy"] == pytest.approx(0.65)
  assert row["accuracy_std"] == pytest.approx(0.3 / 2**0.5)
  assert row["row_error"] == pytest.approx(0.2)
  assert row["rank_residual"] == pytest.approx([0.5, 0.3])
  assert "accuracy_std" not in pooled_row([each])
