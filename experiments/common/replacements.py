"""Putting other attention operators into a frozen teacher, and measuring each."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.clock import operator_milliseconds
from asap_jax.compiler.fidelity import (
  FidelitySums,
  fidelity_sums,
  plan_of,
)
from asap_jax.compiler.operators import Operator, Sinkhorn, Softmax, operator_of
from asap_jax.compiler.recorder import recorder
from asap_jax.compiler.sites import (
  Replacement,
  find_sinkhorn,
  held_at,
  replace_sites,
)
from experiments.common.timing import time_interleaved


def call_model(model: nnx.Module, batch: Any) -> jax.Array:
  """The model's outputs."""
  return model(batch)


class Layer(NamedTuple):
  """A Sinkhorn attention of a teacher on one batch.

  Attributes:
    calls: queries, keys and masks of its calls.
    held: the attention functions of the compared models in this place, by their names.
  """

  calls: tuple[Activation, ...]
  held: dict[str, Any]

  def plans(self) -> dict[str, np.ndarray]:
    """Each model's plan of the first call, `[batch, heads, n, m]`."""
    return {
      name: np.asarray(plan_of(self.calls[0], operator_of(held)))
      for name, held in self.held.items()
    }


def layers_of(
  teacher: nnx.Module, compared: Mapping[str, nnx.Module], batch: Any
) -> list[Layer]:
  """Layers in the teacher's order, as the teacher runs on a batch."""
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, call_model)
  return [
    Layer(
      calls,
      {name: held_at(model, site) for name, model in compared.items()},
    )
    for site, calls in zip(sites, record(batch), strict=True)
  ]


def attention_milliseconds(
  teacher: nnx.Module, compared: Mapping[str, nnx.Module], batch: Any
) -> dict[str, float]:
  """Median times of the attention operators alone, summed over the layers."""
  totals = np.zeros(len(compared))
  for layer in layers_of(teacher, compared, batch):
    operators = [operator_of(held) for held in layer.held.values()]
    totals += operator_milliseconds(layer.calls[0], operators)
  return dict(zip(compared, map(float, totals), strict=True))


def softmax_swap(teacher: nnx.Module) -> nnx.Module:
  """The teacher with softmax in the place of every Sinkhorn attention."""
  return put_in_place(teacher, Softmax())


def by_ott(teacher: nnx.Module) -> nnx.Module:
  """The teacher with OTT-JAX's own iterations: as others have it, and as slow."""
  return _swap(teacher, lambda own: dataclasses.replace(own, implementation="ott"))


def cut_sinkhorn(teacher: nnx.Module, iterations: int) -> nnx.Module:
  """The teacher with its Sinkhorn attentions stopped after some full iterations.

  They start where the teacher's do, and run in their fastest form: the one to beat.
  """
  cut: dict[str, Any] = {"iterations": iterations, "implementation": None}
  return _swap(teacher, lambda own: dataclasses.replace(own, **cut))


def put_in_place(teacher: nnx.Module, operator: Operator) -> nnx.Module:
  """The teacher with an operator in the place of every Sinkhorn attention."""
  return _swap(teacher, lambda own: operator)


def _swap(
  teacher: nnx.Module, operator_for: Callable[[Sinkhorn], Operator]
) -> nnx.Module:
  sites = find_sinkhorn(teacher)
  functions = [
    Replacement(operator_for(site.teacher).attention_fn, **site.options)
    for site in sites
  ]
  return replace_sites(teacher, sites, functions)


def plan_fidelity(
  teacher: nnx.Module,
  replaced: Mapping[str, nnx.Module],
  batches: Iterable[Any],
  reference: Sinkhorn | None = None,
) -> dict[str, dict[str, float]]:
  """TV, KL and column error of every replacement's plans on the teacher's activations.

  Means over rows (columns), heads and layers, as all methods are given the queries and
  keys of the untouched teacher. They are compared with the teacher's plans, or with
  those of `reference`.
  """
  layers = layer_fidelity(teacher, replaced, batches, reference)
  return {name: mean_over_layers(of_method) for name, of_method in layers.items()}


def layer_fidelity(
  teacher: nnx.Module,
  replaced: Mapping[str, nnx.Module],
  batches: Iterable[Any],
  reference: Sinkhorn | None = None,
) -> dict[str, list[dict[str, Any]]]:
  """Fidelity as `plan_fidelity` has it, layer by layer; `layer` is the name of each."""
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, call_model)
  operators = [
    [operator_of(held_at(model, site)) for model in replaced.values()] for site in sites
  ]
  sums: dict[str, dict[int, FidelitySums]] = {name: {} for name in replaced}
  for batch in batches:
    for index, (site, calls) in enumerate(zip(sites, record(batch), strict=True)):
      for activation in calls:
        found = fidelity_sums(activation, operators[index], reference or site.teacher)
        for name, new in zip(replaced, found, strict=True):
          old = sums[name].get(index)
          sums[name][index] = new if old is None else old + new
  return {
    name: [
      {"layer": site.name, **_means(of_method[index])}
      for index, site in enumerate(sites)
    ]
    for name, of_method in sums.items()
  }


def _means(sums: FidelitySums) -> dict[str, float]:
  return {
    "tv": float((sums.tv / sums.rows).mean()),
    "kl": float((sums.kl / sums.rows).mean()),
    "column_error": float((sums.column_error / sums.columns).mean()),
  }


def mean_over_layers(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Means of what `layer_fidelity` says of one method."""
  names = ("tv", "kl", "column_error")
  return {name: float(np.mean([layer[name] for layer in layers])) for name in names}


def milliseconds_of(
  runs: Mapping[str, Callable[[Any], jax.Array]], batch: Any, repeats: int = 15
) -> dict[str, float]:
  """Median times of functions of a batch; warm, in turn."""
  for run in runs.values():
    jax.block_until_ready(run(batch))  # compiles
  calls = {name: functools.partial(run, batch) for name, run in runs.items()}
  times = time_interleaved(calls, repeats)
  return {name: taken.median for name, taken in times.items()}


def forward(model: nnx.Module) -> Callable[[Any], jax.Array]:
  """A jitted forward pass, a function of a batch."""
  graph, state = nnx.split(model)
  return functools.partial(_forward, graph, state)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, state: nnx.State, batch: Any) -> jax.Array:
  return nnx.merge(graph, state)(batch)
