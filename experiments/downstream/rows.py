"""Rows of several seeds as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_EXACT = ("n_test", "slices", "closures")


def pooled(per_seed: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Means over seeds, row by row.

  Args:
    per_seed: rows of each seed; those of equal method and shift belong together.

  Returns:
    Rows in the order of their first appearance. `accuracies` are those of the seeds,
    `None` where a seed has no such row; `accuracy_std` is their deviation, from two
    seeds on. `layers` are means likewise, and a mean that no seed has is `None`.
  """
  places = dict.fromkeys(_place(row) for rows in per_seed for row in rows)
  by_place = [{_place(row): row for row in rows} for rows in per_seed]
  return [_one([found.get(place) for found in by_place]) for place in places]


def _place(row: Mapping[str, Any]) -> tuple[str, str | None]:
  return row["method"], row.get("shift")


def _one(given: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
  rows = [row for row in given if row is not None]
  pool: dict[str, Any] = {}
  for name, first in rows[0].items():
    values = [row[name] for row in rows]
    if name == "layers":
      pool[name] = [_means(of_layer) for of_layer in zip(*values, strict=True)]
    elif isinstance(first, str) or name in _EXACT:
      pool[name] = first
    else:
      pool[name] = _mean(values)
    if name == "accuracy":
      if rows[1:]:
        pool["accuracy_std"] = float(np.std(values, ddof=1))
      pool["accuracies"] = [None if row is None else row[name] for row in given]
  return pool


def _means(of_layer: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  return {
    name: first if isinstance(first, str) else _mean([each[name] for each in of_layer])
    for name, first in of_layer[0].items()
  }


def _mean(values: Sequence[float | None]) -> float | None:
  found = [value for value in values if value is not None]
  return float(np.mean(found)) if found else None
