"""Checkpoints of a training run: the latest to go on from, and the best to keep."""

import csv
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from experiments.common.results import write_whole

_ARRAYS, _NOTES = "arrays", "notes"


class Restored(NamedTuple):
  """Content of a checkpoint.

  Attributes:
    step: that it was saved after.
    arrays: pytree as it was saved.
    notes: what JSON can hold, as it was saved.
  """

  step: int
  arrays: Any
  notes: dict[str, Any]


class Checkpoints:
  """Checkpoints below a directory, of which the latest and the best stay.

  Each is written aside and renamed, so that a process killed at any moment leaves the
  earlier ones; `save` returns when it is on the disk. A context manager.

  Args:
    directory: created if it is not there.
  """

  def __init__(self, directory: pathlib.Path):
    policies = checkpoint_managers
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(1),
            # Sorted stably by it, so that of equals the latest stays.
            policies.BestN(
              get_metric_fn=lambda metrics: metrics["accuracy"],
              n=1,
              # What a killed process has half removed goes.
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
        save_decision_policy=policies.FixedIntervalPolicy(1),
        cleanup_tmp_directories=True,
        # Without it, metrics are not written.
        best_fn=lambda metrics: metrics["accuracy"],
        enable_async_checkpointing=False,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self._manager.close()

  def save(
    self, step: int, arrays: Any, notes: Mapping[str, Any], accuracy: float
  ) -> None:
    """Writes a checkpoint, and then removes those that are neither latest nor best."""
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{
          _ARRAYS: ocp.args.StandardSave(arrays),
          _NOTES: ocp.args.JsonSave(dict(notes)),
        }
      ),
      metrics={"accuracy": accuracy},
    )
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def latest(self, like: Any) -> Restored | None:
    """The last one, `None` if there is none.

    `like` is a pytree of arrays of the shapes, dtypes and shardings to restore.
    """
    step = self._manager.latest_step()
    return None if step is None else self._restore(step, like)

  def best(self, like: Any) -> Restored | None:
    """The one of the highest accuracy, of equals the last; `None` if there is none."""
    metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
    # Those without were half removed when a process was killed: they were not the best.
    accuracies = {step: found["accuracy"] for step, found in metrics.items() if found}
    if not accuracies:
      return None
    return self._restore(max(accuracies, key=lambda s: (accuracies[s], s)), like)

  def _restore(self, step: int, like: Any) -> Restored:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    found = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{
          _ARRAYS: ocp.args.StandardRestore(abstract),
          _NOTES: ocp.args.JsonRestore(),
        }
      ),
    )
    return Restored(step, found[_ARRAYS], found[_NOTES])


class MetricsLog:
  """A table of metrics, one line a step, that a resumed run goes on with.

  A context manager.

  Args:
    path: CSV file with a line of column names; what it holds beyond `step` is removed,
      as it will be written again.
    columns: their names, the first of which is `step`.
    step: that the run goes on from, 0 for a new one.
  """

  def __init__(self, path: pathlib.Path, columns: Sequence[str], step: int = 0):
    kept = [",".join(columns)]
    if path.exists():
      # A line without its end was cut off, one without a number damaged by a crash.
      lines = path.read_text(errors="replace").split("\n")[1:-1]
      whole = [line for line in lines if line.partition(",")[0].isdecimal()]
      if len(whole) < len(lines):
        print(f"{path}: {len(lines) - len(whole)} damaged lines are left out")
      kept += [line for line in whole if int(line.partition(",")[0]) <= step]
    write_whole(path, "\n".join(kept) + "\n")
    self._columns = columns
    self._file = path.open("a", newline="")
    self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

  def write(self, **values: float) -> None:
    """Adds a line; columns that are not named stay empty.

    It reaches the disk with the next `flush`.
    """
    self._writer.writerow(values)

  def flush(self) -> None:
    """Waits until all lines are on the disk."""
    self._file.flush()
    os.fsync(self._file.fileno())

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()
