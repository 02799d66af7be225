"""The latest and the best checkpoint, and the log beside them."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.downstream.checkpoints import Checkpoints, MetricsLog

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


def test_log_goes_on_after_the_step_that_is_resumed(tmp_path, capsys):
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
  # A crash may leave zeros where a line was to be.
  with path.open("a") as file:
    file.write("\0" * 7 + "\n4,1.0,1.0\n")
  with MetricsLog(path, ("step", "loss", "accuracy"), 4):
    pass
  assert path.read_text().split("\n")[3:] == ["3,7.5,1.0", "4,1.0,1.0", ""]
  assert "metrics.csv: 1 damaged lines are left out" in capsys.readouterr().out
  with MetricsLog(path, ("step", "loss", "accuracy")):
    pass
  assert path.read_text() == "step,loss,accuracy\n"
