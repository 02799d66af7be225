"""Train Sinkhorn Transformers on texts or images, replace their attention, and count.

python -m experiments.downstream --dataset NAME --out DIR [--data-dir D]
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.common.attentions import trainable
from experiments.common.results import (
  new_directory,
  print_rows,
  seeds_of,
  write_results,
)
from experiments.datasets.tasks import Task, load_task
from experiments.downstream.checkpoints import write_whole
from experiments.downstream.data import foreign_batches, load
from experiments.downstream.evaluation import LEAST_GAIN, recovered
from experiments.downstream.presets import PRESETS, preset_of
from experiments.downstream.rows import pooled
from experiments.downstream.seeds import baseline_row, run_seed
from experiments.report import draw_accuracy, draw_frontier

# Trained whatever is named: the teacher, and what it has to beat.
TRAINED = ("softmax", "sinkhorn")
_OPTIONS = "options.json"
# May differ when a run is resumed.
_FREE = ("out", "resume", "data_dir")


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--dataset", required=True, help="its name in TFDS")
  parser.add_argument("--data-dir", type=pathlib.Path, help="with prepared data sets")
  parser.add_argument("--input-key", help="feature with the text or image")
  parser.add_argument("--label-key", help="feature with the class")
  parser.add_argument("--train-split")
  parser.add_argument("--test-split")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="new directory")
  parser.add_argument("--preset", choices=PRESETS, default="tiny")
  parser.add_argument(
    "--attention",
    type=trainable,
    nargs="+",
    default=[],
    help="peers to train from scratch as well",
  )
  parser.add_argument("--slices", type=_count, default=8)
  parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="as 0,1,2")
  parser.add_argument("--resume", action="store_true", help="go on with a killed run")
  parser.add_argument("--steps", type=_count, help="of training")
  parser.add_argument(
    "--refine-steps", type=_steps, help="per layer; 0 for the ridge fit alone"
  )
  parser.add_argument("--test-limit", type=_count, help="test examples at most")
  parser.add_argument(
    "--shift-dataset", help="compile on its inputs, too, to see what shift does"
  )
  args = parser.parse_args(arguments)
  started = time.perf_counter()
  try:
    check_out(args)
    task = load_task(
      args.dataset,
      data_dir=args.data_dir,
      input_key=args.input_key,
      label_key=args.label_key,
      train_split=args.train_split,
      test_split=args.test_split,
    )
  except (ValueError, argparse.ArgumentTypeError) as error:
    parser.error(str(error))
  run(task, args, started)


def run(task: Task, args: argparse.Namespace, started: float) -> list[dict[str, Any]]:
  """The whole experiment; returns the rows that it writes to `out/results.json`."""
  write_whole(args.out / _OPTIONS, json.dumps(options_of(args), indent=1))
  preset = preset_of(args.preset, task.kind, task.name)
  given = _given(steps=args.steps, refine_steps=args.refine_steps)
  preset = dataclasses.replace(preset, **given)
  directory = args.out / args.dataset.replace("/", "-").replace(":", "-")
  data = load(task, preset, directory / "tokenizer", args.test_limit)
  foreign = None
  if args.shift_dataset is not None:
    foreign = foreign_batches(
      args.shift_dataset, task, data, preset, directory / "tokenizer", args.data_dir
    )
  seconds = {"data": time.perf_counter() - started}
  names = list(dict.fromkeys((*TRAINED, *args.attention)))
  one = functools.partial(run_seed, data, foreign, preset, names, args)
  per_seed = [_kept(directory / f"seed{seed}", one, seed) for seed in args.seeds]
  linear = _kept(directory, lambda *_: baseline_row(task), 0, "linear.json")

  rows = pooled([each["rows"] for each in per_seed])
  share = recovered({row["method"]: row for row in rows})
  for row in rows:
    if row["method"] in share:
      row["recovered"] = share[row["method"]]
  rows.append(linear)
  rows += pooled([each["shift"] for each in per_seed])
  for name in ("train", "compile", "evaluate"):
    seconds[name] = sum(each["seconds"][name] for each in per_seed)
  for seed, each in zip(args.seeds, per_seed, strict=True):
    seconds[f"seed {seed}"] = sum(each["seconds"].values())
  # Of all processes that had a share in it.
  seconds["total"] = seconds["data"] + sum(
    seconds[name] for name in ("train", "compile", "evaluate")
  )
  config = {**options_of(args), "preset_values": dataclasses.asdict(preset)}
  path = write_results(args.out, "downstream", config, rows, seconds)
  results = json.loads(path.read_text())
  draw_accuracy([results], args.out / "accuracy.png")
  draw_frontier(results, args.out / "frontier.png")
  own = [row for row in rows if "shift" not in row]
  count = f"{len(task.test) if args.test_limit is None else args.test_limit}"
  print_rows(_shown(own), f"{task.name}, {count} test examples")
  print_rows(_shown(row for row in rows if "shift" in row), "Inputs of another kind")
  if None in share.values():
    print(
      f"recovered is empty: the teacher gains less than {LEAST_GAIN} over softmax in "
      "its place"
    )
  print(f"Wrote {path}, {args.out / 'accuracy.png'} and {args.out / 'frontier.png'}")
  print("Seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
  return rows


def check_out(args: argparse.Namespace) -> None:
  """Checks that nothing is overwritten, and that a run is resumed as it was begun.

  Raises:
    ValueError: if the run in `out` had other options.
    argparse.ArgumentTypeError: if `out` holds anything and there is nothing to resume.
  """
  path, options = args.out / _OPTIONS, options_of(args)
  if not (args.resume and path.exists()):
    # A run that was killed before it began is begun.
    new_directory(str(args.out))
    return
  before = json.loads(path.read_text())
  for name in options:
    if name not in _FREE and options[name] != before.get(name):
      raise ValueError(
        f"--{name.replace('_', '-')} is {options[name]}: the run in {args.out} had "
        f"{before.get(name)}; resume it with its own options, or name a new directory"
      )


def options_of(args: argparse.Namespace) -> dict[str, Any]:
  """All options, as JSON has them."""
  return {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in vars(args).items()
  }


def _kept(
  directory: pathlib.Path,
  make: Callable[[int, pathlib.Path], Any],
  seed: int,
  name: str = "rows.json",
) -> Any:
  """What `make` gives, or what it gave before the run was resumed."""
  path = directory / name
  if not path.exists():
    write_whole(path, json.dumps(make(seed, directory), indent=1))
  return json.loads(path.read_text())


def _given(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def _shown(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed: means over the seeds, and the spread of the accuracy."""
  names = ("method", "shift", "accuracy", "recovered", "tv", "kl", "column_error")
  shown = []
  for row in rows:
    cells = {name: row[name] for name in (*names, "milliseconds") if name in row}
    if "accuracy_std" in row:
      cells["accuracy"] = f"{row['accuracy']:.4f} ± {row['accuracy_std']:.4f}"
    shown.append(cells)
  return shown


def _count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
  return int(text)


def _steps(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least zero")
  return int(text)


if __name__ == "__main__":
  main()
