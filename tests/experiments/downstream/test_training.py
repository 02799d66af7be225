"""Killed and resumed, a training run ends as if nothing had happened."""

import csv
import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import small_training
from helpers.pages import ROOT

import asap_jax
from experiments.common.models import observed
from experiments.common.train import TrainConfig
from experiments.downstream import training
from experiments.downstream.models import TextEncoder

# Of a process of its own.
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


pytestmark = pytest.mark.filterwarnings(
  # Orbax's own, of its handlers.
  "ignore::DeprecationWarning:orbax"
)


def assert_equal(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 8])
def test_a_run_that_stopped_ends_alike(tmp_path, stop):
  with pytest.raises(small_training.StoppedError):
    small_training.run(tmp_path, stop=stop)
  assert_same_end(small_training.run(tmp_path), tmp_path)


@pytest.mark.slow
def test_a_run_that_ended_is_not_trained_again(tmp_path):
  small_training.run(tmp_path)
  before = (tmp_path / "metrics.csv").read_bytes()
  assert_same_end(small_training.run(tmp_path, stop=0), tmp_path)
  assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_is_killed_ends_alike(tmp_path):
  code = f"from helpers import small_training as s; s.run({str(tmp_path)!r}, pause=7)"
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


@pytest.mark.slow
def test_two_devices_share_a_batch():
  code = "from helpers import small_training as s; s.print_on_two_devices()"
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


@pytest.mark.slow
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


def test_errors_of_columns_leave_padding_out():
  model = TextEncoder(small_training.SIZES, asap_jax.softmax_attention, nnx.Rngs(0))
  batch = small_training.examples(8, 0)
  graph, states = nnx.graphdef(model), nnx.state(model, nnx.Param, ...)
  found = training.error_of_columns(graph, *states, batch)
  _, plans = observed(model, batch["ids"], batch["valid"])
  errors = [
    np.abs(np.float64(plan)[:, :n, :n].sum(-2) - 1.0).ravel()
    for plan, n in zip(plans[0], batch["valid"].sum(-1), strict=True)
  ]
  assert len({len(each) for each in errors}) > 1, "all of one length"
  np.testing.assert_allclose(found, np.concatenate(errors).mean(), rtol=1e-5)
