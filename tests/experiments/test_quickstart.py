"""What experiments share, and the quickstart from end to end on a few steps."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from asap_jax.compiler import measuring as measure
from experiments import quickstart
from experiments.common.digits import batches_of, digits, shift_digits
from experiments.common.results import new_directory, print_rows, write_results


def test_digits_are_split_by_seed_without_overlap():
  first, again, other = digits(0), digits(0), digits(1)
  assert first.train.inputs.shape == (1437, 64)
  assert first.test.inputs.shape == (360, 64)
  np.testing.assert_array_equal(first.test.inputs, again.test.inputs)
  assert not np.array_equal(first.test.inputs, other.test.inputs)
  assert set(first.train.labels) == set(range(10))
  assert 0.0 <= first.train.inputs.min() < first.train.inputs.max() == 1.0


def test_shifted_digits_are_moved_by_a_pixel_at_most():
  image = np.zeros((1, 8, 8), np.float32)
  image[0, 3, 4] = 1.0
  rng = np.random.default_rng(0)
  places = set()
  for _ in range(100):
    moved = shift_digits(image.reshape(1, 64, 1), rng).reshape(8, 8)
    assert moved.sum() == 1.0
    places.add(tuple(map(int, np.argwhere(moved)[0])))
  assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_batches_are_whole():
  batches = batches_of(np.arange(10), 4)
  np.testing.assert_array_equal(batches, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize("size", [4, 5, 20])
def test_batches_that_keep_the_rest_hold_everything(size):
  batches = batches_of(np.arange(10), size, keep_rest=True)
  np.testing.assert_array_equal(np.concatenate(batches), np.arange(10))
  assert {len(batch) for batch in batches[:-1]} <= {size}


def test_results_go_to_new_directories_alone(tmp_path):
  assert new_directory(str(tmp_path)) == tmp_path
  assert new_directory(str(tmp_path / "new")) == tmp_path / "new"
  (tmp_path / "results.json").write_text("{}")
  for name in (tmp_path, tmp_path / "results.json"):
    with pytest.raises(argparse.ArgumentTypeError, match="name a new directory"):
      new_directory(str(name))


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


def test_quickstart_refuses_unknown_attentions(tmp_path, capsys):
  with pytest.raises(SystemExit):
    quickstart.main(["--out", str(tmp_path / "out"), "--attention", "lott"])
  assert "name='lott': expected one of" in capsys.readouterr().err


def test_quickstart_runs_from_end_to_end(tmp_path, monkeypatch):
  def few_digits(seed):
    data = digits(seed)
    parts = [type(part)(*(array[:256] for array in part)) for part in data[:2]]
    return type(data)(*parts, data.classes)

  monkeypatch.setattr(quickstart, "digits", few_digits)
  monkeypatch.setattr(
    quickstart, "MODEL", dataclasses.replace(quickstart.MODEL, layers=1)
  )
  # Rows are measured apart from the report, whose other cuts take long to compile.
  monkeypatch.setattr(measure, "CUTS", (1,))
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
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  assert rows["asap"]["restored_identical"] is True
  assert (out / "plans.png").stat().st_size > 10_000
  assert (out / "compiled" / "manifest.json").is_file()
