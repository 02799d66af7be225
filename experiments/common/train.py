"""Training and evaluating classifiers."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from experiments.common.digits import Split


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How to train: AdamW, warm-up over a tenth of the steps, then cosine decay.

  Raises:
    ValueError: if `steps` or `batch_size` is below one.
  """

  steps: int
  batch_size: int = 32
  learning_rate: float = 4e-3
  weight_decay: float = 0.05
  label_smoothing: float = 0.0

  def __post_init__(self):
    for name in ("steps", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: expected at least one")


@functools.cache
def transformation(config: TrainConfig) -> optax.GradientTransformation:
  """That of Optax: the same object for equal `config`, so that a step compiles once."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0,
    config.learning_rate,
    max(1, config.steps // 10),
    # One step has no decay, but Optax wants some.
    max(2, config.steps),
  )
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, weight_decay=config.weight_decay),
  )


def train_classifier(
  model: nnx.Module,
  split: Split,
  config: TrainConfig,
  seed: int,
  label: str,
  augment: Callable[[np.ndarray, np.random.Generator], np.ndarray],
) -> None:
  """Trains `model` in place on shuffled epochs of `split`, with a progress bar.

  `augment` changes the inputs of a batch at random.

  Raises:
    FloatingPointError: if the loss is not finite at the end.
  """
  optimizer = nnx.Optimizer(model, transformation(config), wrt=nnx.Param)
  rng = np.random.default_rng(seed)
  order = np.empty(0, int)
  columns = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.3f}"),
    TimeRemainingColumn(),
  )
  model.train()
  with Progress(*columns) as progress:
    task = progress.add_task(label, total=config.steps, loss=np.nan, accuracy=np.nan)
    for step in range(config.steps):
      if len(order) < config.batch_size:
        order = rng.permutation(len(split.labels))
      chosen, order = order[: config.batch_size], order[config.batch_size :]
      metrics = _train_step(
        model, optimizer, split.inputs[chosen], split.labels[chosen]
      )
      if step % 20 == 0 or step == config.steps - 1:  # reading them waits for the step
        loss, accuracy = (float(metric) for metric in metrics)
        progress.update(task, completed=step + 1, loss=loss, accuracy=accuracy)
  model.eval()
  if not np.isfinite(loss):
    raise FloatingPointError(f"{label}: training loss is {loss} after the last step")


@nnx.jit
def _train_step(
  model: nnx.Module, optimizer: nnx.Optimizer, inputs: ArrayLike, labels: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  def loss_fn(model):
    logits = model(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()

  (loss, accuracy), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
  optimizer.update(model, gradients)
  return loss, accuracy


@nnx.jit
def predict(model: nnx.Module, inputs: ArrayLike) -> jax.Array:
  """Class logits."""
  return model(inputs)


def accuracy(model: nnx.Module, split: Split, batch_size: int = 120) -> float:
  """Share of right predictions, 0 to 1, over all of `split`."""
  right = 0
  for start in range(0, len(split.labels), batch_size):
    stop = start + batch_size
    logits = predict(model, jnp.asarray(split.inputs[start:stop]))
    right += int((np.asarray(logits).argmax(-1) == split.labels[start:stop]).sum())
  return right / len(split.labels)
