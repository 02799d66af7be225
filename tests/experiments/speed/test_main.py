"""The command of `experiments.speed`."""

import json
import re
import subprocess
import sys

import pytest
from helpers.pages import ROOT

from experiments.speed import __main__ as speed


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--methods sofmax", "invalid choice: 'sofmax' .*softmax"),
    ("--preset tpu", "invalid choice: 'tpu' .*cpu"),
    ("--dtype int8", "invalid choice: 'int8' .*bfloat16"),
    ("--lengths 64 1", "--lengths: '1': expected an integer from 2 up"),
    ("--lengths 1e3", "--lengths: '1e3': expected an integer from 2 up"),
    ("--repeats 2", "--repeats: '2': expected an integer from 3 up"),
    ("--slices 0", "--slices: '0': expected an integer from 1 up"),
  ],
)
def test_options_that_make_no_sense_are_refused(option, message, capsys, tmp_path):
  with pytest.raises(SystemExit):
    speed.main(["--out", str(tmp_path / "new"), *option.split()])
  assert re.search(message, capsys.readouterr().err)


def test_nothing_but_jax_and_the_package_is_needed():
  code = """
import sys
sys.modules.update(dict.fromkeys(("ott", "jaxopt", "lineax", "matplotlib", "sklearn")))
from experiments.speed import __main__, display
import pathlib
assert display.draw([], pathlib.Path("none.png")) == []
"""
  out = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=-1)
  assert b"Matplotlib is not installed: no figures" in out.stdout


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, capsys):
  out = tmp_path / "out"
  speed.main(
    [
      *("--out", str(out), "--preset", "cpu", "--lengths", "16", "32"),
      *("--batch", "2", "--heads", "2", "--head-dim", "8", "--slices", "2", "1"),
      *("--iterations", "2", "--repeats", "3", "--dense-gib", "1e-4"),
      *("--methods", "softmax", "potentials", "sinkhorn_step"),
    ]
  )
  results = json.loads((out / "results.json").read_text())
  assert results["experiment"] == "speed"
  rows = results["rows"]
  expected = [
    ("softmax", "xla"),
    ("softmax", "xla_blocked"),
    ("softmax", "jax_nn"),
    ("potentials", "xla"),
    ("sinkhorn_step", "xla"),
    ("sinkhorn_step", "chunked"),
    ("sinkhorn_step", "ott"),
    ("sinkhorn_step", "ott_unrolled"),  # at 32 over --dense-gib
  ]
  found = [(row["length"], row["method"], row["implementation"]) for row in rows]
  assert found == [(16, *name) for name in expected] + [
    (32, *name) for name in expected[:-1]
  ]
  for row in rows:
    assert row["batch"] == row["heads"] == 2
    assert (row["head_dim"], row["dtype"]) == (8, "float32")
    assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert row["repeats"] == 3
    assert isinstance(row["temp_bytes"], int)
    assert ("slices" in row) == (row["method"] == "potentials")
    assert ("ratio_to_softmax" in row) == (row["method"] != "sinkhorn_step")
  ratios = [row["ratio_to_softmax"] for row in rows if row["method"] == "softmax"]
  assert min(ratios[:3]) == min(ratios[3:]) == 1.0
  printed = capsys.readouterr().out
  skipped = results["config"]["skipped"]
  assert len(skipped) == 3
  assert all(reason in printed for reason in skipped)
  assert "16: softmax cudnn, sinkhorn_step cudnn: cuDNN needs a GPU" in skipped[0]
  assert "at 2 x 2 x 32: sinkhorn_step ott_unrolled: n x m matrices" in skipped[2]
  assert "exponent" in printed
  assert (out / "scaling.png").stat().st_size > 10_000


def test_nothing_timed_is_an_error(tmp_path):
  options = "--lengths 16 --heads 2 --methods softmax_step --dense-gib 0".split()
  with pytest.raises(SystemExit, match="Nothing could be timed"):
    speed.main(["--out", str(tmp_path / "out"), *options])
