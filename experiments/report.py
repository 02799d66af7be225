"""Gather results.json of several runs, of any experiment, into one table and figures.

python -m experiments.report DIR [DIR ...] [--out NEW]
"""

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.arguments import new_directory
from experiments.common.figures import draw_accuracy, draw_frontier, frontier_of
from experiments.common.results import with_spread

# In front, in this order; other columns follow as they come.
_FIRST = (
  "run",
  "method",
  "shift",
  "accuracy",
  "recovered",
  "tv",
  "kl",
  "column_error",
  "milliseconds",
  "ratio_to_softmax",
)
# Told with the accuracy, or too long for a table.
_HIDDEN = ("accuracy_std",)

Results = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("directories", type=pathlib.Path, nargs="+", metavar="DIR")
  parser.add_argument("--out", type=new_directory, help="new directory for files")
  args = parser.parse_args(arguments)
  try:
    gathered = {str(path): read_results(path) for path in args.directories}
  except ValueError as error:
    parser.error(str(error))
  table = markdown(list(gathered.values()))
  print(table)
  if args.out is None:
    return
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / "report.md").write_text(table + "\n")
  if any("accuracy" in row for each in gathered.values() for row in each["rows"]):
    panels = [(name_of(each), each["rows"]) for each in gathered.values()]
    draw_accuracy(panels, args.out / "accuracy.png")
  for number, (name, results) in enumerate(gathered.items()):
    if frontier_of(results["rows"]):
      stem = f"frontier-{number}-{pathlib.Path(name).resolve().name}"
      path = args.out / f"{stem}.png"
      draw_frontier(results["rows"], path, title=name_of(results))
  print(f"Wrote {', '.join(sorted(str(path) for path in args.out.iterdir()))}")


def read_results(directory: pathlib.Path) -> dict[str, Any]:
  """Reads `directory/results.json`, written by an experiment.

  Raises:
    ValueError: if there is no such file, or it is not in the format of experiments.
  """
  path = directory / "results.json"
  if not path.is_file():
    raise ValueError(f"{path} does not exist: expected a directory of an experiment")
  try:
    results = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON: {error}") from None
  needed = {"experiment", "config", "environment", "rows"}
  missing = needed - (results.keys() if isinstance(results, dict) else set())
  if missing:
    raise ValueError(
      f"{path} lacks {sorted(missing)}: expected an experiment's results"
    )
  return results


def name_of(results: Results) -> str:
  """Experiment and data set."""
  data = results["config"].get("dataset")
  return results["experiment"] + ("" if data is None else f", {data}")


def markdown(gathered: Sequence[Results]) -> str:
  """One table in Markdown, a line for every row of every run.

  Columns are what any of them measured as a number or a word; accuracies show their
  deviation over seeds. A line per run below says what it was measured with.
  """
  lines = [
    {"run": name_of(results), **row} for results in gathered for row in results["rows"]
  ]
  there = dict.fromkeys(
    name
    for line in lines
    for name, value in line.items()
    if value is not None and not isinstance(value, list | dict)
  )
  columns = [name for name in _FIRST if name in there]
  columns += [name for name in there if name not in (*_FIRST, *_HIDDEN)]
  table = [columns, ["---"] * len(columns)]
  table += [[_cell(line, name) for name in columns] for line in lines]
  text = [f"| {' | '.join(cells)} |" for cells in table]
  text.append("")
  text += [f"- {name_of(results)}: {_origin(results)}" for results in gathered]
  return "\n".join(text)


def _cell(line: Mapping[str, Any], name: str) -> str:
  value = line.get(name)
  if value is None or isinstance(value, list | dict):
    return ""
  if isinstance(value, float):
    shown = f"{value:.4g}" if math.isfinite(value) else str(value)
    return with_spread(line) if name == "accuracy" else shown
  return str(value).replace("|", "\\|")


def _origin(results: Results) -> str:
  place = results["environment"]
  parts = [f"{place.get('device_kind')}", f"JAX {place.get('jax')}"]
  if place.get("commit"):
    parts.append(f"commit {place['commit']}")
  seeds = results["config"].get("seeds", results["config"].get("seed"))
  if seeds is not None:
    many = isinstance(seeds, list)
    parts.append(f"seeds {', '.join(map(str, seeds))}" if many else f"seed {seeds}")
  if "total" in results.get("seconds", {}):
    parts.append(f"{results['seconds']['total']:.0f} s")
  return ", ".join(parts)


if __name__ == "__main__":
  main()
