"""Plans, time and memory of trained models."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from asap_jax import metrics
from experiments.common.digits import Split, batches_of
from experiments.common.models import loss_of_maps, observed
from experiments.common.timing import temp_bytes, time_interleaved
from experiments.common.train import accuracy

BATCH, REPEATS = 120, 15


def measure(model: nnx.Module, test: Split) -> dict[str, Any]:
  """Accuracy, and properties of the plans, as means over the test images."""
  observe = functools.partial(_observed, *nnx.split(model))
  batches = batches_of(test.inputs, BATCH, keep_rest=True)
  found = [jax.tree.map(np.asarray, observe(batch)) for batch in batches]
  sizes = [len(batch) for batch in batches]
  means = jax.tree.map(lambda *x: np.average(x, axis=0, weights=sizes), *found)
  means = {name: value.tolist() for name, value in means.items()}
  return {"accuracy": accuracy(model, test, BATCH), **means, "n_test": sum(sizes)}


def column_error_of(model: nnx.Module, inputs: np.ndarray) -> float:
  """Mean column error of the plans, over layers, heads and keys, on one batch."""
  return float(_observed(*nnx.split(model), inputs)["column_error"])


@functools.partial(jax.jit, static_argnums=0)
def _observed(graph: nnx.GraphDef, state: nnx.State, inputs: jax.Array):
  states, plans = observed(nnx.merge(graph, state), inputs)
  return {
    "row_error": metrics.row_error(plans).mean(),
    "column_error": metrics.column_error(plans).mean(),
    "column_errors": metrics.column_error(plans).mean((1, 2, 3)),
    "attention_sink_share": metrics.attention_sink_share(plans).mean(),
    "rank_residual": metrics.rank_residual(jnp.stack(states)).mean(-1),
  }


def cost_of(models: Mapping[str, nnx.Module], test: Split) -> dict[str, dict[str, Any]]:
  """Time and temporary memory of a forward pass and of a training step, on a batch.

  A step is the loss and the gradients of all parameters, without the optimizer, which
  is the same for all.
  """
  batch = Split(*(part[:BATCH] for part in test))
  calls, temp = {}, {}
  for name, model in models.items():
    for kind, run in _compiled(model, batch).items():
      calls[name, kind], temp[name, kind] = run
  times = time_interleaved(calls, REPEATS)
  base = times.get(("softmax", "forward"))
  costs = {}
  for name in models:
    forward, step = times[name, "forward"], times[name, "step"]
    costs[name] = {
      "milliseconds": forward.median,
      "quartiles": list(forward.quartiles),
      "temp_bytes": temp[name, "forward"],
      "step_milliseconds": step.median,
      "step_quartiles": list(step.quartiles),
      "step_temp_bytes": temp[name, "step"],
    }
    if base is not None:
      costs[name]["ratio_to_softmax"] = forward.median / base.median
  return costs


def _compiled(
  model: nnx.Module, batch: Split
) -> dict[str, tuple[Callable[[], Any], int | None]]:
  """A forward pass and a training step: calls, and bytes that XLA needs besides."""
  graph, *states = nnx.split(model, nnx.Param, ...)
  params, rest = states

  def forward(params, inputs, labels):
    return nnx.merge(graph, params, rest)(inputs)

  def loss(params, inputs, labels):
    model = nnx.merge(graph, params, rest, copy=True)  # it may keep what it sees
    model.train()
    logits = model(inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss + loss_of_maps(model)

  found: dict[str, tuple[Callable[[], Any], int | None]] = {}
  arguments = jax.tree.map(jnp.asarray, (params, *batch))
  functions = {"forward": forward, "step": jax.value_and_grad(loss)}
  for kind, function in functions.items():
    run = jax.jit(function).lower(*arguments).compile()
    found[kind] = functools.partial(run, *arguments), temp_bytes(run)
  return found
