"""Training and evaluating classifiers."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

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

from experiments.common.attentions import build
from experiments.common.digits import Split, shift_digits
from experiments.common.models import Encoder, EncoderConfig, loss_of_maps

# Steps between looks at the metrics.
LOG_EVERY = 20
# At a model while it is trained.
LOOKS = 8


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


class Watch:
  """A progress bar of training that measures its speed; a context manager."""

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
    """Waits for the metrics of a step and shows them, with the speed since the last.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
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


@functools.cache
def transformation(config: TrainConfig) -> optax.GradientTransformation:
  """Optax's optimizer: one object for equal `config`, so that a step compiles once."""
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


def train_encoders(
  names: Sequence[str],
  split: Split,
  config: EncoderConfig,
  seed: int,
  steps: int,
  *,
  needed: Sequence[str] = (),
  look: Callable[[str, nnx.Module], None] | None = None,
) -> dict[str, Encoder]:
  """Encoders of digits by the names of their attentions, trained with one budget.

  Those whose loss does not stay finite are left out, and the reason is printed. `look`
  is called with a name and its model after every eighth of the steps.

  Raises:
    FloatingPointError: if one of them is `needed`.
  """
  models = {}
  for name in names:
    model, label = build(name, config, seed), f"{name}, seed {seed}"
    try:
      see = None if look is None else functools.partial(look, name)
      train_classifier(model, split, TrainConfig(steps), seed, label, shift_digits, see)
    except FloatingPointError as error:
      if name in needed:
        raise
      print(error)
    else:
      models[name] = model
  return models


def train_classifier(
  model: nnx.Module,
  split: Split,
  config: TrainConfig,
  seed: int,
  label: str,
  augment: Callable[[np.ndarray, np.random.Generator], np.ndarray],
  look: Callable[[nnx.Module], None] | None = None,
) -> None:
  """Trains `model` in place on shuffled epochs of `split`, with a progress bar.

  `augment` changes the inputs of a batch at random. `look` sees the model, in
  evaluation mode, after every eighth of the steps.

  Raises:
    FloatingPointError: if the loss is not finite.
  """
  optimizer = nnx.Optimizer(model, transformation(config), wrt=nnx.Param)
  rng = np.random.default_rng(seed)
  order = np.empty(0, int)
  looks = {round(config.steps * part / LOOKS) for part in range(1, LOOKS + 1)}
  model.train()
  with Watch(label, config, 0) as watch:
    for step in range(1, config.steps + 1):
      if len(order) < config.batch_size:
        order = rng.permutation(len(split.labels))
      chosen, order = order[: config.batch_size], order[config.batch_size :]
      metrics = _train_step(
        model, optimizer, split.inputs[chosen], split.labels[chosen]
      )
      if step % LOG_EVERY == 0 or step == config.steps:  # reading them waits for it
        watch.read(step, *metrics)
      if look is not None and step in looks:
        model.eval()
        look(model)
        model.train()
  model.eval()


@nnx.jit
def _train_step(
  model: nnx.Module, optimizer: nnx.Optimizer, inputs: ArrayLike, labels: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  def loss_fn(model):
    logits = model(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss + loss_of_maps(model), (logits.argmax(-1) == labels).mean()

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
