"""What breaks: faults injected into saved models, inputs drawn for attention.

python -m experiments.stress --out DIR
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.common.arguments import add_seed, parser_for, writable
from experiments.common.results import (
  options_of,
  print_end,
  print_rows,
  write_results,
  write_whole,
)
from experiments.common.timing import Laps
from experiments.stress import calls, damage, disks, drawn, kills, refused, writers

Rows = list[dict[str, Any]]
# Shapes of attention that are compiled, draws of each, and how many go together.
_SHAPES, _DRAWS, _TOGETHER = 100, 100, 10


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__, out=writable)
  add_seed(parser)
  parser.add_argument("--quick", action="store_true", help="a few tries of each")
  args = parser.parse_args(arguments)
  laps = Laps()
  rows: Rows = []
  for name, part in parts(args).items():
    found = kept(args, name, part, parser)
    rows += found
    laps.end(name.partition(" ")[0])
  rows = merged(rows)
  print_rows(rows, "What was lost")
  path = write_results(args.out, "stress", options_of(args), rows, laps.seconds)
  print_end(laps.seconds, path)


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Rows]]:
  """Everything that is tried, by name, in turn."""
  some, seed = (lambda full, quick: quick if args.quick else full), args.seed
  shapes = drawn.configs(_SHAPES, seed)[:: some(1, 17)]
  draws = some(_DRAWS, 5)

  def of_calls(first: int) -> Callable[[], Rows]:
    own = shapes[first : first + _TOGETHER]
    return lambda: calls.measured(own, draws, seed + first)

  return {
    "kills": in_folder(lambda at: kills.killed(at / "kills", some(200, 2), seed)),
    "damage": in_folder(lambda at: damage.damaged(at / "damage", some(64, 2), seed)),
    "foreign": in_folder(lambda at: [damage.foreign(at / "foreign")]),
    "writers": in_folder(lambda at: writers.two_writers(at / "two", some(20, 1))),
    "readers": in_folder(
      lambda at: [writers.readers(at / "read", some(40, 4), some(60, 4))]
    ),
    "disks": lambda: disks.disks(some(40, 2)),
    "arguments": refused.refused,
    **{f"calls {i}": of_calls(i) for i in range(0, len(shapes), _TOGETHER)},
  }


def in_folder(part: Callable[[pathlib.Path], Rows]) -> Callable[[], Rows]:
  """A part that is given a folder of its own."""

  def run() -> Rows:
    with tempfile.TemporaryDirectory() as folder:
      return part(pathlib.Path(folder))

  return run


def kept(
  args: argparse.Namespace,
  name: str,
  part: Callable[[], Rows],
  parser: argparse.ArgumentParser,
) -> Rows:
  """Rows of a part, of an earlier run where it was ended there."""
  path = args.out / "parts" / f"{name.replace(' ', '_')}.json"
  config = {"seed": args.seed, "quick": args.quick}
  if path.exists():
    before = json.loads(path.read_text())
    if before["config"] != config:
      parser.error(f"--out {args.out} is of a run with other options: name another")
    return before["rows"]
  print(f"{name} ...", flush=True)
  rows = part()
  # A process may map only so many pieces of code.
  jax.clear_caches()
  write_whole(path, json.dumps({"config": config, "rows": rows}))
  return rows


def merged(rows: Rows) -> Rows:
  """One row a method: sums, and the worst of what is the worst."""
  found: dict[str, dict[str, Any]] = {}
  for row in rows:
    own = found.setdefault(row["method"], {"method": row["method"]})
    for name in row.keys() - {"method"}:
      join = max if name.startswith("worst") else lambda a, b: a + b
      own[name] = join(own[name], row[name]) if name in own else row[name]
  return [{k: row[k] for k in _ORDER if k in row} for row in found.values()]


_ORDER = (
  *("method", "shapes", "tried", "told", "old", "new", "lost", "litter", "not_finite"),
  *("rows_off", "padding_not_zero", "beyond_bound", "worst_share", "worst_row"),
)

if __name__ == "__main__":
  main()
