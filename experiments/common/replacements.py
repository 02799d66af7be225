"""Putting other attention operators into a frozen teacher, and measuring each."""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from asap_jax.attention.functions import sinkhorn_attention, softmax_attention
from asap_jax.compiler.fidelity import FidelitySums, fidelity_sums, operator_of
from asap_jax.compiler.sites import find_sinkhorn, held_at, recorder, replace_sites

Call = Callable[[nnx.Module, Any], jax.Array]


def softmax_swap(teacher: nnx.Module) -> nnx.Module:
  """The teacher with softmax in the place of every Sinkhorn attention."""
  return _swap(teacher, softmax_attention)


def cut_sinkhorn(teacher: nnx.Module, iterations: int) -> nnx.Module:
  """The teacher with its Sinkhorn attentions stopped after some full iterations.

  In the scaling domain, which is their fastest form: what a compiled model has to beat.
  """
  return _swap(teacher, sinkhorn_attention, iterations=iterations, implementation="xla")


def _swap(
  teacher: nnx.Module, function: Callable[..., jax.Array], **own: Any
) -> nnx.Module:
  sites = find_sinkhorn(teacher)
  functions = [functools.partial(function, **site.options, **own) for site in sites]
  return replace_sites(teacher, sites, functions)


def plan_fidelity(
  teacher: nnx.Module,
  replaced: Mapping[str, nnx.Module],
  batches: Iterable[Any],
  call: Call,
) -> dict[str, dict[str, float]]:
  """TV, KL and column error of every replacement's plans on the teacher's activations.

  Means over rows (columns), heads and layers, as all methods are given the queries and
  keys of the untouched teacher.
  """
  layers = layer_fidelity(teacher, replaced, batches, call)
  return {name: mean_over_layers(of_method) for name, of_method in layers.items()}


def layer_fidelity(
  teacher: nnx.Module,
  replaced: Mapping[str, nnx.Module],
  batches: Iterable[Any],
  call: Call,
) -> dict[str, list[dict[str, Any]]]:
  """The same layer by layer, in the model's order; `layer` is its name."""
  sites = find_sinkhorn(teacher)
  record = recorder(teacher, sites, call)
  operators = [
    [operator_of(held_at(model, site)) for model in replaced.values()] for site in sites
  ]
  sums: dict[str, dict[int, FidelitySums]] = {name: {} for name in replaced}
  for batch in batches:
    for index, (site, calls) in enumerate(zip(sites, record(batch), strict=True)):
      for activation in calls:
        found = fidelity_sums(activation, operators[index], site.iterations)
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


def forward_milliseconds(
  models: Mapping[str, nnx.Module], batch: Any, call: Call, repeats: int = 15
) -> dict[str, float]:
  """Median times of a forward pass of each model; compiled, warm, in turn."""
  runs = {name: forward(model, call) for name, model in models.items()}
  return milliseconds_of(runs, batch, repeats)


def milliseconds_of(
  runs: Mapping[str, Callable[[Any], jax.Array]], batch: Any, repeats: int = 15
) -> dict[str, float]:
  """Median times of functions of a batch; warm, in turn."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(batch))
      if repeat:  # the first one compiles
        times[name].append(1e3 * (time.perf_counter() - start))
  return {name: float(np.median(taken)) for name, taken in times.items()}


def forward(model: nnx.Module, call: Call) -> Callable[[Any], jax.Array]:
  """A jitted forward pass, a function of a batch."""
  graph, state = nnx.split(model)
  return functools.partial(_forward, graph, call, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(
  graph: nnx.GraphDef, call: Call, state: nnx.State, batch: Any
) -> jax.Array:
  return call(nnx.merge(graph, state), batch)


def ordered(rows: Mapping[str, dict[str, Any]], order: Sequence[str]) -> list[dict]:
  """Rows of results.json in a given order of methods."""
  return [{"method": name, **rows[name]} for name in order]
