"""The progress of a training run, shown and measured."""

import time
from typing import Any

import jax
import numpy as np
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from experiments.common.train import TrainConfig


class Watch:
  """A progress bar of a run that knows how fast it is; a context manager."""

  def __init__(self, label: str, config: TrainConfig, start: int):
    self._label, self._batch_size, self._step = label, config.batch_size, start
    self._progress = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn(
        "loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}  "
        "{task.fields[examples_per_second]:.0f} examples/s"
      ),
      TimeRemainingColumn(),
    )
    names = ("loss", "accuracy", "examples_per_second")
    nothing: dict[str, Any] = dict.fromkeys(names, np.nan)
    self._bar = self._progress.add_task(
      label, total=config.steps, completed=start, **nothing
    )
    self._start = self._last = time.perf_counter()

  def __enter__(self) -> "Watch":
    self._progress.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._progress.stop()

  @property
  def seconds(self) -> float:
    """Since the start, in this process."""
    return time.perf_counter() - self._start

  def read(self, step: int, loss: jax.Array, accuracy: jax.Array) -> dict[str, float]:
    """Waits for the metrics of a step and shows them, with the speed since the last."""
    values = {"loss": float(loss), "accuracy": float(accuracy)}
    if not np.isfinite(values["loss"]):
      raise FloatingPointError(
        f"{self._label}: training loss is {values['loss']} after step {step}"
      )
    now = time.perf_counter()
    seen = (step - self._step) * self._batch_size
    values["examples_per_second"] = seen / (now - self._last)
    self._step, self._last = step, now
    fields: dict[str, Any] = values
    self._progress.update(self._bar, completed=step, **fields)
    return values
