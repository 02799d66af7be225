"""The paper's sizes, spread over devices, killed and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import tfds_sets
from helpers.pages import ROOT

LIMIT = 900  # seconds, of a process on a machine that does much else


@pytest.mark.slow
def test_a_killed_run_of_the_papers_sizes_is_resumed_to_its_end(tmp_path):
  folder, out = tfds_sets.write_dbpedia(tmp_path / "tfds"), tmp_path / "out"
  # Short texts, few steps and small batches, a share for every device; all else as is.
  given = "--preset paper --seeds 0 --steps 3 --batch-size 8 --length 16 --train-only"
  command = [sys.executable, "-W", "ignore", "-m", "experiments.downstream"]
  command += ["--dataset", "dbpedia_14", "--data-dir", folder, "--out", out]
  command += given.split()
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
  options = {"env": {**os.environ, "XLA_FLAGS": flags}, "cwd": ROOT}
  seed = out / "dbpedia_14" / "seed0"

  killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
  try:
    _wait_for(seed / "softmax" / "checkpoints" / "1", killed)
  finally:
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
  assert not (seed / "rows.json").exists()
  done = _steps(seed / "softmax")
  assert done[0] == 1
  line = _line_of_first_step(seed / "softmax")

  resumed = subprocess.run(
    [*command, "--resume"], capture_output=True, text=True, timeout=LIMIT, **options
  )
  assert resumed.returncode == 0, resumed.stderr
  assert "Nothing to resume" not in resumed.stdout
  assert _steps(seed / "softmax") == _steps(seed / "sinkhorn") == [1, 2, 3]
  # It went on from the first step: a step taken anew would have another speed.
  assert _line_of_first_step(seed / "softmax") == line
  results = json.loads((out / "results.json").read_text())
  preset = results["config"]["preset_values"]
  assert (preset["width"], preset["layers"], preset["dtype"]) == (256, 6, "bfloat16")
  rows = {row["method"]: row for row in results["rows"]}
  assert list(rows) == ["softmax", "sinkhorn", "linear"]
  assert rows["sinkhorn"]["n_test"] == 28
  assert rows["sinkhorn"]["column_error"] < 0.02 < rows["softmax"]["column_error"]


def _wait_for(path, process):
  until = time.monotonic() + LIMIT
  while not path.is_dir() and time.monotonic() < until:
    assert process.poll() is None
    time.sleep(0.05)
  assert path.is_dir()


def _line_of_first_step(directory):
  return (directory / "metrics.csv").read_text().split("\n")[1]


def _steps(directory):
  with (directory / "metrics.csv").open() as file:
    return [int(row["step"]) for row in csv.DictReader(file)]
