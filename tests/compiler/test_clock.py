"""Times in turn, with a clock that is made up."""

import pytest

from asap_jax.compiler import clock


class Runs:
  """Runs that take the times of lists, one after the other, the last one for ever."""

  def __init__(self, monkeypatch, **seconds):
    self.now, self.calls = 0.0, dict.fromkeys(seconds, 0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
    self.runs = {name: self._run(name, times) for name, times in seconds.items()}

  def _run(self, name, times):
    def run():
      # The first call compiles.
      place = min(max(self.calls[name] - 1, 0), len(times) - 1)
      self.now += times[place]
      self.calls[name] += 1

    return run


def fastest(times):
  return min(times, key=times.get)


def test_medians_of_five_rounds(monkeypatch):
  runs = Runs(monkeypatch, one=[3.0, 1.0, 2.0, 9.0, 2.5])
  assert clock.milliseconds_in_turn(runs.runs) == {"one": pytest.approx(2500.0)}
  assert runs.calls == {"one": 6}


def test_rounds_go_on_until_their_halves_decide_alike(monkeypatch):
  # In the first rounds one is faster in every other of them.
  uneven = [0.9, 1.1] * 3 + [0.9]
  runs = Runs(monkeypatch, one=uneven, other=[1.0])
  times = clock.milliseconds_in_turn(runs.runs, fastest, seconds=1000.0)
  assert fastest(times) == "one"
  # One more to compile; of sixteen rounds most odd ones are past what is uneven.
  assert 6 < runs.calls["one"] <= 17


def test_an_order_that_never_settles_ends_with_its_seconds(monkeypatch):
  runs = Runs(monkeypatch, one=[0.9, 1.1] * 500, other=[1.0])
  clock.milliseconds_in_turn(runs.runs, fastest, seconds=20.0)
  assert 12 <= runs.calls["one"] <= 20


def test_what_is_far_slower_takes_few_turns(monkeypatch):
  runs = Runs(monkeypatch, fast=[1.0], slow=[4.0], slower=[50.0])
  times = clock.milliseconds_in_turn(runs.runs)
  expected = {"fast": 1e3, "slow": 4e3, "slower": 5e4}
  assert times == {name: pytest.approx(value) for name, value in expected.items()}
  # One more to compile.
  assert runs.calls == {"fast": 6, "slow": 5, "slower": 4}
