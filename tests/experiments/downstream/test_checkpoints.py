"""Killed and resumed, a training run ends as if nothing had happened."""

import csv
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_training
from helpers.pages import ROOT

from experiments.common.train import TrainConfig
from experiments.downstream.checkpoints import Checkpoints, MetricsLog, write_whole

# Of a process of its own.
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
pytestmark = pytest.mark.filterwarnings(
  # Orbax's own, of its handlers.
  "ignore::DeprecationWarning:orbax"
)


def state(step):
  return {
    "weights": jnp.arange(3.0) + step,
    "inner": (jnp.uint32(step), jnp.full((2, 2), step, jnp.bfloat16)),
  }


def assert_equal(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_latest_and_best_are_kept(tmp_path):
  like = state(0)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest(like) is None
    assert checkpoints.best(like) is None
    for step, accuracy in ((2, 0.5), (4, 0.7), (6, 0.7), (8, 0.6), (10, 0.1)):
      notes = {"batches": {"next": step}, "seconds": 1.5}
      checkpoints.save(step, state(step), notes, accuracy)
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [6, 10]
  with Checkpoints(tmp_path) as checkpoints:
    latest, best = checkpoints.latest(like), checkpoints.best(like)
  # Of two equally good ones, the later.
  assert (latest.step, best.step) == (10, 6)
  assert_equal(latest.arrays, state(10))
  assert_equal(best.arrays, state(6))
  assert latest.notes == {"batches": {"next": 10}, "seconds": 1.5}


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state(2), {}, 0.5)
  half = tmp_path / "4.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "arrays").write_text("cut off")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest(state(0)).step == 2


def test_a_checkpoint_that_was_half_removed_is_passed_over(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state(2), {}, 0.5)
  shutil.copytree(tmp_path / "2", tmp_path / "1")
  shutil.rmtree(tmp_path / "1" / "metrics")
  (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best(state(0)).step == checkpoints.latest(state(0)).step == 2
    checkpoints.save(4, state(4), {}, 0.6)
    assert checkpoints.best(state(0)).step == 4
  assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_log_goes_on_after_the_step_that_is_resumed(tmp_path):
  path = tmp_path / "new" / "metrics.csv"
  with MetricsLog(path, ("step", "loss", "accuracy")) as log:
    for step in (1, 2, 10):
      log.write(step=step, loss=step / 2)
    log.flush()
  # Killed in the midst of a line, of step 12.
  with path.open("a") as file:
    file.write("1")
  with MetricsLog(path, ("step", "loss", "accuracy"), 2) as log:
    log.write(step=3, loss=7.5, accuracy=1.0)
  assert path.read_text() == "step,loss,accuracy\n1,0.5,\n2,1.0,\n3,7.5,1.0\n"
  with MetricsLog(path, ("step", "loss", "accuracy")):
    pass
  assert path.read_text() == "step,loss,accuracy\n"


def test_files_are_written_whole(tmp_path, monkeypatch):
  path = tmp_path / "deep" / "file"
  write_whole(path, "first")

  def fails(*_):
    raise OSError("no room")

  monkeypatch.setattr(os, "replace", fails)
  with pytest.raises(OSError, match="no room"):
    write_whole(path, "second")
  assert path.read_text() == "first"


@functools.cache
def whole():
  """The run that nothing interrupts: its result, metrics, and directory's contents."""
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    result = small_training.run(directory)
    return result, metrics_of(directory)


def metrics_of(directory):
  """Lines of the log without the speed, which differs from run to run."""
  with (directory / "metrics.csv").open() as file:
    rows = list(csv.DictReader(file))
  return [{n: v for n, v in row.items() if n != "examples_per_second"} for row in rows]


def assert_same_end(result, directory):
  expected, metrics = whole()
  assert metrics_of(directory) == metrics
  assert result.best_step == expected.best_step
  assert result.held_out_accuracy == expected.held_out_accuracy
  assert_equal(small_training.parameters(result), small_training.parameters(expected))


def test_a_run_learns_and_keeps_what_was_best():
  result, metrics = whole()
  assert [int(row["step"]) for row in metrics] == [3, 6, 9, 12]
  accuracies = [float(row["held_out_accuracy"]) for row in metrics]
  best = max(accuracies)
  assert result.held_out_accuracy == best > accuracies[0]
  latest_of_best = [3, 6, 9, 12][len(accuracies) - 1 - accuracies[::-1].index(best)]
  assert result.best_step == latest_of_best
  # The model is the one of that step.
  right = [
    np.asarray(small_training.forward(result.model, batch)).argmax(-1) == batch["label"]
    for batch in small_training.held_out()
  ]
  assert np.concatenate(right).mean() == best


@pytest.mark.parametrize("stop", [2, 8])
def test_a_run_that_stopped_ends_alike(tmp_path, stop):
  with pytest.raises(small_training.StoppedError):
    small_training.run(tmp_path, stop=stop)
  assert_same_end(small_training.run(tmp_path), tmp_path)


def test_a_run_that_ended_is_not_trained_again(tmp_path):
  small_training.run(tmp_path)
  before = (tmp_path / "metrics.csv").read_bytes()
  assert_same_end(small_training.run(tmp_path, stop=0), tmp_path)
  assert (tmp_path / "metrics.csv").read_bytes() == before


def test_a_run_that_is_killed_ends_alike(tmp_path):
  code = f"import small_training as s; s.run({str(tmp_path)!r}, pause=7)"
  killed = subprocess.Popen(
    [sys.executable, "-W", "ignore", "-c", code],
    env=ENVIRONMENT,
    stdout=subprocess.DEVNULL,
  )
  try:
    saved = tmp_path / "checkpoints" / "6"
    until = time.monotonic() + 240
    while not saved.is_dir() and time.monotonic() < until:
      assert killed.poll() is None
      time.sleep(0.05)
  finally:
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
  assert saved.is_dir()
  assert not (tmp_path / "checkpoints" / "9").exists()
  assert_same_end(small_training.run(tmp_path), tmp_path)


def test_two_devices_share_a_batch():
  code = "import small_training as s; s.print_on_two_devices()"
  flags = os.environ["XLA_FLAGS"]
  flags += " --xla_force_host_platform_device_count=2"
  found = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code],
    env={**ENVIRONMENT, "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    timeout=240,
  )
  assert found.returncode == 0, found.stderr
  *_, devices, error, norm = found.stdout.split("\n")[-2].split()
  assert int(devices) == 2
  assert error == "batch_size=3:"
  expected, _ = whole()
  leaves = jax.tree.leaves(small_training.parameters(expected))
  size = float(np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in leaves)))
  assert float(norm) == pytest.approx(size, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = TrainConfig(steps=3, batch_size=8, learning_rate=float("nan"))
  with pytest.raises(FloatingPointError, match="small: training loss is nan"):
    small_training.run(tmp_path, config=config)


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_numbers_that_are_not_positive(name):
  with pytest.raises(ValueError, match=f"{name}=0: expected at least one"):
    TrainConfig(**{"steps": 1, name: 0})


def test_smoothed_labels_bound_the_loss_from_below(tmp_path):
  """With share s on all of c classes, no prediction has less loss than its entropy."""
  config = TrainConfig(steps=30, batch_size=8, learning_rate=3e-2, label_smoothing=0.3)
  small_training.run(tmp_path, config=config, checks=1)
  *_, last = metrics_of(tmp_path)
  targets = np.array([0.7 + 0.3 / 3, 0.1, 0.1])
  entropy = -(targets * np.log(targets)).sum()
  assert entropy < float(last["loss"]) < np.log(3)
