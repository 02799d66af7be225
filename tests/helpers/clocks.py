"""Clocks that are made up: milliseconds of each kind of operator."""

import functools

from asap_jax.compiler import selection
from asap_jax.compiler.operators import Asap, Sinkhorn, Softmax


def stand_in(monkeypatch, of_kind):
  """Lets `asap_jax.compile` and `choose` measure times that `of_kind` gives."""
  operators = {}

  def attention_call(operator, activation):
    call = functools.partial(lambda: None)
    operators[id(call)] = call, operator
    return call

  def milliseconds_in_turn(runs, decide=None, seconds=0.0):
    return {name: of_kind(operators[id(run)][1]) for name, run in runs.items()}

  monkeypatch.setattr(selection, "attention_call", attention_call)
  monkeypatch.setattr(selection, "milliseconds_in_turn", milliseconds_in_turn)


def iterations_take(operator):
  """Starts that are not free, and OTT-JAX's form, take far longer."""
  slow = operator.start != "zero" or operator.implementation == "ott"
  return 1.0 + operator.iterations + 50.0 * slow


def maps_are_fast(operator):
  """Maps without slices cost hardly more than their closures, all else much more."""
  if isinstance(operator, Softmax):
    return 99.0
  if isinstance(operator, Sinkhorn):
    return iterations_take(operator)
  return 1.1 + operator.dual_map.closures + 50.0 * operator.dual_map.is_sliced


def maps_are_slow(operator):
  if isinstance(operator, Asap | Softmax):
    return 99.0
  return iterations_take(operator)
