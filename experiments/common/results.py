"""results.json: one format for every experiment, written whole or not at all."""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


def new_directory(name: str) -> pathlib.Path:
  """Type of an argument of argparse: a directory that holds nothing yet.

  Raises:
    argparse.ArgumentTypeError: if it does, as results are not overwritten.
  """
  path = pathlib.Path(name)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise argparse.ArgumentTypeError(f"{path} is not empty: name a new directory")
  return path


def seeds_of(text: str) -> list[int]:
  """Type of an argument of argparse: seeds, as `0,1,2`.

  Raises:
    argparse.ArgumentTypeError: if they are no numbers.
  """
  try:
    return [int(part) for part in text.split(",")]
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r}: expected seeds as 0,1,2") from None


def environment() -> dict[str, Any]:
  """What the figures were measured with."""
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
  """That of the checkout, if it is one and there is git."""
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
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile("w", dir=out, suffix=".tmp", delete=False) as file:
    json.dump(content, file, indent=1)
  path = out / "results.json"
  os.replace(file.name, path)
  return path


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
