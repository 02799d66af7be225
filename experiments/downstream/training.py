"""Training that can be killed: same batches, same dropout, same result when resumed."""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asap_jax.metrics import column_error, masked_mean
from experiments.common.models import loss_of_maps, observed
from experiments.common.train import LOG_EVERY, TrainConfig, Watch, transformation
from experiments.downstream.checkpoints import Checkpoints, MetricsLog
from experiments.downstream.roads import advance

COLUMNS = (
  "step",
  "loss",
  "accuracy",
  "held_out_accuracy",
  "column_error",
  "examples_per_second",
)

Batch = dict[str, Any]
HeldOut = Callable[[], Iterator[Batch]]


class TrainState(NamedTuple):
  """All arrays that a step changes or needs.

  Attributes:
    params: of the model.
    optimizer: of Optax.
    rest: the model's other variables.
    key: key data of the run's random numbers; those of a step follow from its number.
  """

  params: nnx.State
  optimizer: optax.OptState
  rest: nnx.State
  key: jax.Array


class Trained(NamedTuple):
  """Result of `train`.

  Attributes:
    model: with the parameters that were best on the held-out batches.
    held_out_accuracy: there.
    best_step: when they were found.
    seconds: of training, in all processes that had a share in it.
    column_errors: of the plans on a held-out batch, at every check; means over layers,
      heads and keys.
  """

  model: nnx.Module
  held_out_accuracy: float
  best_step: int
  seconds: float
  column_errors: list[float]


def train(
  model: nnx.Module,
  batches: Any,
  held_out: HeldOut,
  config: TrainConfig,
  *,
  seed: int,
  checks: int,
  directory: pathlib.Path,
  label: str,
) -> Trained:
  """Trains on as many steps as `config` says, from the last checkpoint if there is one.

  A batch is spread over all local devices, the parameters are on each of them. A killed
  run that is started again ends as it would have without, on a CPU to the last bit.

  Args:
    model: called as `model(batch, rngs)`, gives class logits, and has `tokens` and
      `states` as those of `experiments.downstream.models`; left untouched.
    batches: an endless iterator of batches with `label`, with `get_state` and
      `set_state` as Grain's have them.
    held_out: gives batches that are not trained on, to choose the best parameters by.
    config: of the optimizer; its `batch_size` is the size of `batches`.
    seed: of dropout.
    checks: looks at the held-out batches, each of which leaves a checkpoint.
    directory: of checkpoints and `metrics.csv`.
    label: of the progress bar.

  Raises:
    ValueError: if the batch size is no multiple of the number of devices.
    FloatingPointError: if the loss is not finite.
  """
  spread, replicated = _shardings(config.batch_size)
  graph, state = nnx.graphdef(model), start(model, config, seed)
  state = jax.device_put(state, replicated)
  every = max(1, config.steps // checks)
  with Checkpoints(directory / "checkpoints") as checkpoints:
    restored = checkpoints.latest(state)
    done, before, errors = 0, 0.0, []
    if restored is not None:
      done, state, notes = restored
      batches.set_state(notes["batches"])
      before, errors = notes["seconds"], notes["column_errors"]
    log = MetricsLog(directory / "metrics.csv", COLUMNS, done)
    with log, Watch(label, config, done) as watch:
      for taken in range(done + 1, config.steps + 1):
        batch = jax.device_put(next(batches), spread)
        state, metrics = step(graph, config, state, batch, taken)
        check = taken % every == 0 or taken == config.steps
        if not (check or taken % LOG_EVERY == 0):
          continue
        values = watch.read(taken, *metrics)
        if not check:
          log.write(step=taken, **values)
          continue
        accuracy = _accuracy(graph, state, held_out())
        error = error_of_columns(graph, state.params, state.rest, next(held_out()))
        errors = [*errors, float(error)]
        log.write(
          step=taken, **values, held_out_accuracy=accuracy, column_error=errors[-1]
        )
        log.flush()
        notes = {
          "batches": batches.get_state(),
          "seconds": before + watch.seconds,
          "held_out_accuracy": accuracy,
          "column_errors": errors,
        }
        checkpoints.save(taken, state, notes, accuracy)
    best = checkpoints.best(state)
  assert best is not None  # the last step leaves a checkpoint
  return Trained(
    nnx.merge(graph, best.arrays.params, best.arrays.rest),
    best.notes["held_out_accuracy"],
    best.step,
    before + watch.seconds,
    errors,
  )


def start(model: nnx.Module, config: TrainConfig, seed: int) -> TrainState:
  """The state of a run that has taken no step; a copy of the model's arrays."""
  params, rest = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param, ...))
  key = jax.random.key_data(jax.random.key(seed))
  return TrainState(params, transformation(config).init(params), rest, key)


def _shardings(batch_size: int) -> tuple[NamedSharding, NamedSharding]:
  """Of batches and of all else, over the local devices."""
  devices = np.array(jax.local_devices())
  if batch_size % len(devices):
    raise ValueError(
      f"batch_size={batch_size}: expected a multiple of the {len(devices)} devices"
    )
  mesh = Mesh(devices, ("data",))
  return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(
    mesh, PartitionSpec()
  )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def step(
  graph: nnx.GraphDef,
  config: TrainConfig,
  state: TrainState,
  batch: Batch,
  number: int,
) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
  """The state after a step, counted from one, and loss and accuracy on its batch.

  The memory of `state` is used for the new one.
  """
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), number)

  def loss_fn(params):
    model = nnx.merge(graph, params, state.rest, copy=True)  # it may keep what it sees
    advance(model, number / config.steps)
    logits = model(batch, nnx.Rngs(dropout=key))
    targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
    targets = optax.smooth_labels(targets, config.label_smoothing)
    right = (logits.argmax(-1) == batch["label"]).mean()
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss + loss_of_maps(model), right

  metrics, gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  updates, optimizer = transformation(config).update(
    gradients, state.optimizer, state.params
  )
  params = optax.apply_updates(state.params, updates)
  return state._replace(params=params, optimizer=optimizer), metrics


@functools.partial(jax.jit, static_argnums=0)
def _right(
  graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, batch: Batch
) -> jax.Array:
  logits = nnx.merge(graph, params, rest)(batch)
  return logits.argmax(-1) == batch["label"]


@functools.partial(jax.jit, static_argnums=0)
def error_of_columns(
  graph: nnx.GraphDef, params: nnx.State, rest: nnx.State, batch: Batch
) -> jax.Array:
  """Mean column error of a model's plans on a batch, over layers, heads and keys."""
  model = nnx.merge(graph, params, rest)
  tokens, valid = model.tokens(batch)
  _, plans = observed(model, tokens, valid)
  if valid is not None:
    valid = valid[:, None]
  return masked_mean(column_error(plans, valid, valid), valid)


def _accuracy(
  graph: nnx.GraphDef, state: TrainState, batches: Iterator[Batch]
) -> float:
  right = [_right(graph, state.params, state.rest, batch) for batch in batches]
  return float(np.concatenate(right).mean())
