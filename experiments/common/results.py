"""results.json: one format for every experiment, written whole or not at all."""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

# The same for all seeds.
_EXACT = ("n_test", "slices", "closures")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
  """All options, as JSON has them."""
  return {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in vars(args).items()
  }


def environment() -> dict[str, Any]:
  """Versions, device and commit that the figures were measured with."""
  device = jax.devices()[0]
  return {
    "jax": jax.__version__,
    "device": device.platform,
    "device_kind": device.device_kind,
    "cpu_count": os.cpu_count(),
    "python": platform.python_version(),
    "commit": _commit(),
  }


def _commit() -> str | None:
  """The commit of the checkout, if this is one and there is git."""
  command = ["git", "rev-parse", "--short", "HEAD"]
  try:
    folder = pathlib.Path(__file__).parent
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
  except FileNotFoundError:
    return None
  return found.stdout.strip() or None


def write_results(
  out: pathlib.Path,
  experiment: str,
  config: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  seconds: Mapping[str, float],
) -> pathlib.Path:
  """Writes `out/results.json` atomically and returns its path."""
  content = {
    "experiment": experiment,
    "config": dict(config),
    "environment": environment(),
    "rows": list(rows),
    "seconds": dict(seconds),
  }
  path = out / "results.json"
  write_whole(path, json.dumps(content, indent=1))
  return path


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all, whoever else writes it.

  Its directory is made if need be, and who may read it follows from the umask.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with aside.open("x", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)


def pooled(per_seed: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Means over seeds, row by row.

  Args:
    per_seed: rows of each seed; those of equal method and shift belong together.

  Returns:
    Rows in the order of their first appearance, each as `pooled_row` makes it.
  """
  places = dict.fromkeys(_place(row) for rows in per_seed for row in rows)
  by_place = [{_place(row): row for row in rows} for rows in per_seed]
  return [pooled_row([found.get(place) for found in by_place]) for place in places]


def _place(row: Mapping[str, Any]) -> tuple[str, str | None]:
  return row["method"], row.get("shift")


def pooled_row(per_seed: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
  """One row from those of all seeds, `None` where a seed has no such row.

  `accuracies` lists them, `None` where there is none; `accuracy_std` is their
  deviation, from two seeds on. `chosen` lists what every seed chose, likewise, for
  seeds may differ. Other lists and `layers` are means place by place. A mean that no
  seed has is `None`.
  """
  rows = [row for row in per_seed if row is not None]
  pool: dict[str, Any] = {}
  for name, first in rows[0].items():
    values = [row[name] for row in rows]
    if name == "layers":
      pool[name] = [_means(of_layer) for of_layer in zip(*values, strict=True)]
    elif name == "chosen":
      pool[name] = [None if row is None else row[name] for row in per_seed]
    elif isinstance(first, str) or name in _EXACT:
      pool[name] = first
    else:
      pool[name] = _mean(values)
    if name == "accuracy":
      if rows[1:]:
        pool["accuracy_std"] = float(np.std(values, ddof=1))
      pool["accuracies"] = [None if row is None else row[name] for row in per_seed]
  return pool


def _means(of_layer: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  return {
    name: first if isinstance(first, str) else _mean([each[name] for each in of_layer])
    for name, first in of_layer[0].items()
  }


def _mean(values: Sequence[Any]) -> Any:
  found = [value for value in values if value is not None]
  return np.mean(found, axis=0).tolist() if found else None


def with_spread(row: Mapping[str, Any], digits: int = 4) -> str:
  """The accuracy of a row, with its deviation over seeds if there are several."""
  spread = row.get("accuracy_std")
  return f"{row['accuracy']:.{digits}f}" + (
    "" if spread is None else f" ± {spread:.{digits}f}"
  )


def print_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
  """Prints rows as a table, a column for everything that any of them measured."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  table = Table(title=title)
  for name in names:
    table.add_column(
      name.replace("_", " "),
      justify="left" if name == "method" else "right",
      no_wrap=True,
    )
  for row in rows:
    table.add_row(*(_format(row.get(name)) for name in names))
  # As wide as it is: rather broken lines on a narrow terminal than figures cut off.
  width = Console(width=10_000).measure(table).maximum
  Console(width=width).print(table)


def _format(value: Any) -> str:
  if value is None:
    return ""
  return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_end(seconds: Mapping[str, float], *paths: pathlib.Path) -> None:
  """Prints the files that were written, and where the time went."""
  print("Wrote", ", ".join(map(str, paths)))
  print("Seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
