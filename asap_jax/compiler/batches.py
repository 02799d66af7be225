"""Batches of a teacher: read as far as needed, and checked before anything is made."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Stored:
  """Batches of an iterator that is read once, and only as far as anybody reads."""

  def __init__(self, batches: Iterator[Any]):
    self._rest = batches
    self.read: list[Any] = []

  def __iter__(self) -> Iterator[Any]:
    for index in itertools.count():
      if index == len(self.read):
        try:
          self.read.append(next(self._rest))
        except StopIteration:
          return
      yield self.read[index]


def check_same(batch: Any, first: Any) -> None:
  """Raises ValueError unless batches begin as they did before."""
  if batch is first:
    return
  own, others = _without_keys(batch), _without_keys(first)
  if len(own) != len(others) or not all(map(np.array_equal, own, others)):
    raise ValueError(
      "batches come in another order than before, which would mix those fitted with "
      "those held out: expected the same order at every pass; pass a list of them, or "
      "an iterator, which is read once"
    )


def _without_keys(batch: Any) -> list[Any]:
  leaves = jax.tree.leaves(batch)
  return [
    x for x in leaves if not jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)
  ]


def check_batch(batch: Any) -> None:
  """Raises ValueError unless all leaves of a batch are arrays or numbers."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    try:
      jax.eval_shape(lambda x: x, leaf)
    except TypeError as error:
      place = jax.tree_util.keystr(path)
      raise ValueError(
        f"batches: the first holds a {type(leaf).__name__}"
        f"{f' at {place}' if place else ''}; expected arrays alone, so leave it out: "
        "({name: batch[name] for name in ...} for batch in batches)"
      ) from error


def check_runs(run: Callable[[Any, Any], Any], state: Any, batch: Any) -> None:
  """Raises ValueError unless a model takes a batch without being observed.

  It is run as a function of its state and the batch.
  """
  try:
    jax.eval_shape(run, state, batch)
  except Exception as error:
    raise ValueError(
      f"the model does not run on the first batch, of {kind_of(batch)}: "
      f"{type(error).__name__}: {error}. Batches are given to it as they are; if it "
      "takes only a part of them, pass call=lambda model, batch: model(batch[...])"
    ) from error


def kind_of(value: object) -> str:
  """A type, with what it holds where that is few."""
  kind = f"type {type(value).__name__}"
  if isinstance(value, tuple | list) and len(value) < 5:
    return f"{kind} of ({', '.join(type(each).__name__ for each in value)})"
  if isinstance(value, dict):
    return f"{kind} with {', '.join(map(repr, value))}"
  return kind
