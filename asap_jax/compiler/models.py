"""Times of whole models: as trained, exact and fastest, compiled, and with softmax."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from asap_jax.compiler.clock import milliseconds_in_turn
from asap_jax.compiler.operators import Operator, Softmax
from asap_jax.compiler.sites import Site, replace_sites


def model_milliseconds(
  model: nnx.Module,
  sites: Sequence[Site],
  compiled: nnx.Module,
  batch: Any,
  call: Callable[[nnx.Module, Any], Any],
) -> dict[str, float]:
  """Median times of a forward pass in evaluation mode; warm, in turn.

  Returns:
    `"as trained"`, `"exact, fastest"` (all iterations in their fastest form),
    `"compiled"` and `"softmax"` (put in the place of every Sinkhorn attention).
  """

  def swapped(operators: Sequence[Operator]) -> nnx.Module:
    functions = [
      functools.partial(operator.attention_fn, **site.options)
      for operator, site in zip(operators, sites, strict=True)
    ]
    return replace_sites(model, sites, functions)

  exact = [dataclasses.replace(site.teacher, implementation=None) for site in sites]
  models = {
    "as trained": nnx.clone(model),
    "exact, fastest": swapped(exact),
    "compiled": nnx.clone(compiled),
    "softmax": swapped([Softmax()] * len(sites)),
  }
  return milliseconds_in_turn(
    {name: _forward(each, batch, call) for name, each in models.items()}
  )


def _forward(
  model: nnx.Module, batch: Any, call: Callable[[nnx.Module, Any], Any]
) -> Callable[[], object]:
  model.eval()
  graph, state = nnx.split(model)

  @jax.jit
  def run(state, batch):
    return call(nnx.merge(graph, state), batch)

  return functools.partial(run, state, batch)
