"""Distilling a compiled model end to end: its dual maps follow the teacher's outputs.

Calibration fits every layer to the teacher's own activations. Here all dual maps are
trained together on the outputs of the whole compiled model, errors of earlier layers
included; every other parameter stays as it is, and no labels are needed.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.progress import track

from asap_jax.attention.layers import DualParam
from asap_jax.compiler.recorded import is_held_out

# Of batches that are kept, with the teacher's outputs.
_CACHE_BYTES = 2**30

Pairs = list[tuple[Any, Any]]  # of a batch and the teacher's outputs, in host memory


class Distilled(NamedTuple):
  """Result of `distil`.

  Attributes:
    model: copy of the compiled model with the best parameters on held-out batches, its
      own included.
    held_out_loss: mean there before the first step and at every check since.
    steps: taken when the parameters of `model` were found.
    batches: number of batches that were trained on.
  """

  model: nnx.Module
  held_out_loss: tuple[float, ...]
  steps: int
  batches: int


def distil(
  model: nnx.Module,
  teacher: nnx.Module,
  batches: Iterable[Any],
  steps: int,
  *,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  learning_rate: float = 1e-2,
  check_every: int = 50,
  seed: int = 0,
  progress: bool = True,
) -> Distilled:
  """Trains the dual maps of a compiled model on the outputs of its frozen teacher.

  Adam with warm-up and cosine decay on `output_error`, over the `DualParam` of `model`
  alone; the rate is relative to the size of each of them. Both models run in evaluation
  mode. Host code: it does not run under jit, vmap or grad.

  The teacher runs once per batch and its outputs are kept: with its iterations it costs
  more than the step itself, and outputs are small beside activations. The first batches
  that fit into 1 GiB together with them are used.

  >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=3, rngs=nnx.Rngs(0))
  >>> batches = jax.random.normal(jax.random.key(1), (3, 4, 6, 8))
  >>> plain = asap_jax.Recipe(slices=2, refine_steps=0)
  >>> compiled, _ = asap_jax.compile(layer, batches, plain, progress=False)
  >>> asap_jax.distil(compiled, layer, batches, steps=2, progress=False).batches
  2

  Args:
    model: compiled by `asap_jax.compile`; left untouched.
    teacher: the model that it was compiled from; left untouched.
    batches: inputs, without labels, in at least two batches; every fifth, from the
      second on, is held out.
    steps: to take, of one batch each, in an order drawn by `seed`.
    call: how a batch is given to a model; returns any pytree of arrays, of which the
      floating ones are compared. Outputs at padding count too: pool them or set them to
      zero here.
    learning_rate: of a step, relative to the root mean square of each parameter array.
    check_every: steps between looks at the held-out batches.
    seed: of the order.
    progress: whether to show progress bars.

  Returns:
    `Distilled`, never worse on held-out batches than `model`. If the loss there turns
    non-finite, a warning says so and the best parameters before it are returned.

  Raises:
    ValueError: if `model` holds no `DualParam`, the two models' outputs do not match or
      hold no floating array, the teacher's are not finite, there are fewer than two
      batches, or a number is not positive.
  """
  positive = {"steps": steps, "learning_rate": learning_rate}
  for name, number in (positive | {"check_every": check_every}).items():
    if not number > 0:
      raise ValueError(f"{name}={number}: expected a positive number")
  student = nnx.clone(model)
  student.eval()
  graph, *states = nnx.split(student, DualParam, ...)
  parameters, rest = states
  if not jax.tree.leaves(parameters):
    raise ValueError("model holds no DualParam: expected a model that was compiled")
  fitted, held_out = _record(student, teacher, batches, call, progress)

  @jax.jit
  def loss(parameters, rest, batch, expected):
    return output_error(call(nnx.merge(graph, parameters, rest), batch), expected)

  warm_up = max(1, steps // 20)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, warm_up, max(steps, warm_up + 1)
  )
  transform = optax.chain(
    optax.scale_by_adam(b2=0.99),
    optax.scale_by_param_block_rms(),
    optax.scale_by_learning_rate(schedule),
  )
  state = transform.init(parameters)

  @jax.jit
  def step(parameters, state, rest, batch, expected):
    gradient = jax.grad(loss)(parameters, rest, batch, expected)
    updates, state = transform.update(gradient, state, parameters)
    return optax.apply_updates(parameters, updates), state

  def judge(parameters):
    # The closure may put out finite numbers for a dual that is not.
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(parameters)):
      return float("nan")
    return float(np.mean([loss(parameters, rest, *pair) for pair in held_out]))

  rng = np.random.default_rng(seed)
  losses = [judge(parameters)]
  best, best_step = parameters, 0
  order: list[int] = []
  for taken in track(range(1, steps + 1), "Distilling", disable=not progress):
    if not order:
      order = list(rng.permutation(len(fitted)))
    parameters, state = step(parameters, state, rest, *fitted[order.pop()])
    if taken % check_every and taken != steps:
      continue
    losses.append(judge(parameters))
    if not np.isfinite(losses[-1]):
      warnings.warn(
        f"loss is {losses.pop()} after {taken} steps; going back to step {best_step}",
        stacklevel=2,
      )
      break
    if losses[-1] < min(losses[:-1]):
      best, best_step = parameters, taken
  distilled = nnx.clone(model)
  nnx.update(distilled, best)
  return Distilled(distilled, tuple(losses), best_step, len(fitted))


def output_error(outputs: Any, expected: Any) -> Float[Array, ""]:
  """Mean squared error over the variance of the expected array, mean over arrays.

  Differentiable, under jit too. The variance is that of all entries of an array; where
  they are all equal, the error counts as it is.

  Args:
    outputs: a pytree of arrays; others than floating ones are left out.
    expected: a pytree of the same structure and shapes.

  Raises:
    ValueError: if the two do not match, or hold no floating array.
  """
  _check_match(outputs, expected)
  errors = []
  for found, target in zip(*map(_floating, (outputs, expected)), strict=True):
    found, target = found.astype(jnp.float32), target.astype(jnp.float32)
    error, variance = jnp.mean((found - target) ** 2), target.var()
    errors.append(error / jnp.where(variance > 0, variance, 1))
  return jnp.stack(errors).mean()


def _record(
  student: nnx.Module,
  teacher: nnx.Module,
  batches: Iterable[Any],
  call: Callable[[nnx.Module, Any], Any],
  progress: bool,
) -> tuple[Pairs, Pairs]:
  """Batches with the teacher's outputs: fitted and held out."""
  frozen = nnx.clone(teacher)
  frozen.eval()
  run = [_pure(model, call) for model in (student, frozen)]
  kept: tuple[Pairs, Pairs] = [], []
  size = 0
  recorded = track(batches, "Recording the teacher", disable=not progress)
  for index, batch in enumerate(recorded):
    if index == 0:
      _check_match(*(jax.eval_shape(function, batch) for function in run))
    pair = jax.device_get((batch, run[1](batch)))
    if not all(np.isfinite(leaf).all() for leaf in _floating(pair[1])):
      raise ValueError(
        f"teacher: its outputs are not finite on batch {index}; expected finite ones"
      )
    kept[is_held_out(index)].append(pair)
    size += sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(pair))
    if size > _CACHE_BYTES and all(kept):
      break
  if not all(kept):
    raise ValueError(
      f"batches holds {len(kept[0])}: expected at least two, one of them to judge by"
    )
  return kept


def _pure(
  model: nnx.Module, call: Callable[[nnx.Module, Any], Any]
) -> Callable[[Any], Any]:
  """Jitted function of a batch; `model` is not changed."""
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, batch: call(nnx.merge(graph, state), batch))
  return jax.tree_util.Partial(run, state)


def _floating(outputs: Any) -> list[Any]:
  leaves = jax.tree.leaves(outputs)
  return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _check_match(outputs: Any, expected: Any) -> None:
  found, wanted = (
    jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
    for tree in (outputs, expected)
  )
  if found != wanted:
    raise ValueError(
      f"the model's outputs are {found}: expected the teacher's {wanted}"
    )
  if not _floating(expected):
    raise ValueError(f"outputs are {wanted}: expected at least one floating array")
