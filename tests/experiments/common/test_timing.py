"""The clock: calls in turn, with repeats that last long enough."""

import pytest

from experiments.common import timing
from experiments.common.timing import time_interleaved, times_of


class Clock:
  """Seconds that pass only while a call runs."""

  def __init__(self, seconds):
    self.now, self.seen, self.seconds = 0.0, [], seconds

  def __call__(self):
    return self.now

  def calls(self):
    return {name: lambda name=name: self.run(name) for name in self.seconds}

  def run(self, name):
    self.now += self.seconds[name]
    self.seen.append(name)


def test_repeats_go_over_all_calls_in_an_order_drawn_by_seed():
  def order(seed):
    clock = Clock(dict.fromkeys("abcd", 1.0))
    time_interleaved(clock.calls(), 3, seed, clock=clock)
    assert clock.seen[:4] == list("abcd")  # one call each, before any is timed
    return [clock.seen[i : i + 4] for i in range(4, len(clock.seen), 4)]

  rounds = order(0)
  assert [sorted(names) for names in rounds] == [list("abcd")] * 3
  assert rounds == order(0) != order(1)
  assert len({tuple(names) for names in rounds}) > 1


@pytest.mark.parametrize("queued", [False, True])
def test_short_calls_are_looped_over_and_long_ones_repeated_less(queued):
  clock = Clock({"short": 2.0**-10, "long": 1.0})
  times = time_interleaved(clock.calls(), 15, queued=queued, clock=clock)
  assert times["short"] == (2.0**-10 * 1e3, (2.0**-10 * 1e3,) * 2, 15)
  assert times["long"] == (1e3, (1e3, 1e3), 3)
  assert clock.seen.count("long") == 4
  loops = " ".join(clock.seen).split("long")
  # A loop of short calls lasts 0.02 s or more, but not much.
  assert all(20 < loop.count("short") < 80 for loop in loops[2:-1] if loop.strip())


def test_times_are_medians_and_quartiles():
  assert times_of([4.0, 1.0, 2.0, 100.0, 3.0]) == (3.0, (2.0, 4.0), 5)


def test_a_single_repeat_is_refused():
  with pytest.raises(ValueError, match="repeats=1: expected at least 3"):
    time_interleaved({}, 1)


def test_laps_add_up(monkeypatch):
  times = iter([0.0, 1.0, 3.0, 7.0, 8.0])
  monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
  laps = timing.Laps()
  for stage in ("train", "compile", "train"):
    laps.end(stage)
  assert laps.seconds == {"train": 5.0, "compile": 2.0, "total": 8.0}
