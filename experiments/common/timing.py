"""A clock for functions that are compared: warm, in turn, in one process."""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

# One rule for all: a repeat is a loop of calls this long, so that neither the clock's
# resolution nor one interruption counts; a call that is slow gets fewer repeats.
LEAST_SECONDS, MOST_SECONDS, FEWEST_REPEATS = 0.02, 2.0, 3
# A first call longer than this need not be repeated to know how long the next takes.
_LONG_SECONDS = 0.5

Name = TypeVar("Name", bound=Hashable)


class Laps:
  """Seconds of the stages of an experiment, from one call of `end` to the next."""

  def __init__(self) -> None:
    self._start = self._last = time.perf_counter()
    self._stages: dict[str, float] = {}

  def end(self, stage: str) -> None:
    """Adds the time since the last end, or since the start, to a stage."""
    now = time.perf_counter()
    self._stages[stage] = self._stages.get(stage, 0.0) + now - self._last
    self._last = now

  @property
  def seconds(self) -> dict[str, float]:
    """Of every stage that has ended, and `total` until now."""
    return {**self._stages, "total": time.perf_counter() - self._start}


class Times(NamedTuple):
  """Milliseconds of a call.

  Attributes:
    median: over the repeats.
    quartiles: the first and the third.
    repeats: how many there were.
  """

  median: float
  quartiles: tuple[float, float]
  repeats: int


def time_interleaved(
  calls: Mapping[Name, Callable[[], Any]],
  repeats: int,
  seed: int = 0,
  *,
  queued: bool = False,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, Times]:
  """Times calls against each other: every repeat goes over all of them.

  Each repeat draws another order. Other work of the machine, and whatever a call leaves
  in the caches, then falls on all calls alike.

  Args:
    calls: functions of nothing that return arrays; compiled, if compiling is not to
      count. Each is run before it is timed.
    repeats: of each call; at least `FEWEST_REPEATS` of those that would take over
      `MOST_SECONDS` in all.
    seed: of the order.
    queued: whether the calls of a repeat are dispatched without waiting for each other,
      as on an accelerator, where waiting costs more than a short kernel. On a CPU they
      would run at the same time.
    clock: seconds.

  Raises:
    ValueError: if `repeats` is below `FEWEST_REPEATS`.
  """
  if repeats < FEWEST_REPEATS:
    raise ValueError(f"repeats={repeats}: expected at least {FEWEST_REPEATS}")
  counts, rounds = {}, {}
  for name, call in calls.items():
    counts[name], seconds = _count(call, queued, clock)
    affordable = math.floor(MOST_SECONDS / max(seconds, LEAST_SECONDS))
    rounds[name] = min(repeats, max(FEWEST_REPEATS, affordable))
  taken: dict[Name, list[float]] = {name: [] for name in calls}
  rng = random.Random(seed)
  for repeat in range(repeats):
    names = [name for name in calls if repeat < rounds[name]]
    rng.shuffle(names)
    for name in names:
      seconds = _elapsed(calls[name], counts[name], queued, clock)
      taken[name].append(1e3 * seconds / counts[name])
  return {name: times_of(milliseconds) for name, milliseconds in taken.items()}


def times_of(milliseconds: Sequence[float]) -> Times:
  """Median and quartiles of repeats."""
  first, median, third = map(float, np.quantile(milliseconds, (0.25, 0.5, 0.75)))
  return Times(median, (first, third), len(milliseconds))


def _count(
  call: Callable[[], Any], queued: bool, clock: Callable[[], float]
) -> tuple[int, float]:
  """Calls in a repeat, and the seconds that they take."""
  count, seconds = 1, _elapsed(call, 1, queued, clock)
  if seconds > _LONG_SECONDS:
    return count, seconds
  seconds = _elapsed(call, count, queued, clock)
  while seconds < LEAST_SECONDS:
    # One short loop says little of the next: no more than ten times as many.
    factor = min(10.0, 1.2 * LEAST_SECONDS / max(seconds, 1e-9))
    count = math.ceil(factor * count)
    seconds = _elapsed(call, count, queued, clock)
  return count, seconds


def _elapsed(
  call: Callable[[], Any], count: int, queued: bool, clock: Callable[[], float]
) -> float:
  start = clock()
  for _ in range(count):
    out = call()
    if not queued:
      jax.block_until_ready(out)
  jax.block_until_ready(out)
  return clock() - start


def temp_bytes(compiled: Any) -> int | None:
  """Bytes that XLA allocates besides arguments and results, if it says."""
  analysis = compiled.memory_analysis()
  return None if analysis is None else int(analysis.temp_size_in_bytes)
