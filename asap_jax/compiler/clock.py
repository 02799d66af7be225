"""Times of attention operators, one after the other in turn, until an order is settled.

What else runs on a machine slows all of them alike when they take turns; and what
decides is measured until both halves of the rounds decide alike.
"""

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.operators import Operator
from asap_jax.masses import valid_pairs

Name = TypeVar("Name", bound=Hashable)

# Rounds before anything is decided.
_LEAST = 5
# A run so many times slower than the fastest takes no turns beyond so many rounds.
_SLOW = ((5.0, 3), (3.0, 4))


def milliseconds_in_turn(
  runs: Mapping[Name, Callable[[], object]],
  decide: Callable[[dict[Name, float]], object] | None = None,
  seconds: float = 0.0,
) -> dict[Name, float]:
  """Median time of each run; warm, in turn.

  Args:
    runs: functions that return arrays, which are waited for.
    decide: a function of the medians, such as the name of the fastest. Rounds go on
      until those of even and of odd rounds decide alike, and all of them too.
    seconds: at most so long beyond the first five rounds.
  """
  for run in runs.values():
    jax.block_until_ready(run())  # compiles
  taken: dict[Name, list[float]] = {name: [] for name in runs}
  end = None
  for rounds in range(1, 1000):
    fastest = min(map(_least, taken.values()))
    for name, run in runs.items():
      turns = min(
        (n for slow, n in _SLOW if _least(taken[name]) > slow * fastest), default=rounds
      )
      if rounds > turns:
        continue
      start = time.perf_counter()
      jax.block_until_ready(run())
      taken[name].append(1e3 * (time.perf_counter() - start))
    if rounds < _LEAST:
      continue
    end = time.perf_counter() + seconds if end is None else end
    if decide is None or time.perf_counter() > end or _settled(taken, decide):
      break
  return {name: statistics.median(times) for name, times in taken.items()}


def _least(times: Sequence[float]) -> float:
  return min(times, default=0.0)


def _settled(
  taken: Mapping[Name, list[float]], decide: Callable[[dict[Name, float]], object]
) -> bool:
  found = [
    decide({name: statistics.median(times[part]) for name, times in taken.items()})
    for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
  ]
  return found[0] == found[1] == found[2]


def operator_milliseconds(
  activation: Activation, operators: Sequence[Operator]
) -> list[float]:
  """Median times of one attention call of each operator; warm, in turn.

  From queries, keys and values (the keys serve as values) to outputs, without forming
  a doubly stochastic plan.
  """
  runs = {
    place: attention_call(operator, activation)
    for place, operator in enumerate(operators)
  }
  return list(milliseconds_in_turn(runs).values())


def attention_call(operator: Operator, activation: Activation) -> Callable[[], object]:
  """One call of an operator as a model makes it, on recorded queries and keys."""
  query, key = (
    np.moveaxis(np.asarray(x), -3, -2) for x in (activation.query, activation.key)
  )
  options = {"bias": activation.bias}
  if activation.segments is None:
    masks = activation.masks
    if any(x is not None and x.dtype != jnp.bool_ for x in masks):
      options |= zip(("query_weights", "key_weights"), masks, strict=True)
    else:
      options["mask"] = valid_pairs(*masks)
    most = None
  else:
    options["segment_ids"] = tuple(ids[..., 0, :] for ids in activation.segments)
    most = activation.max_segments or max(int(x.max()) for x in activation.segments)
  arguments = jax.device_put((jnp.asarray(query), jnp.asarray(key), options))
  return functools.partial(_call, most, operator, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _call(max_segments, operator, query, key, options):
  return operator.attention_fn(
    query, key, key, scale=1.0, max_segments=max_segments, **options
  )
