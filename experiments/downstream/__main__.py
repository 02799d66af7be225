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

from experiments.common.arguments import (
  new_directory,
  parser_for,
  positive,
  seed_list,
  whole,
  writable,
)
from experiments.common.attentions import trainable
from experiments.common.figures import draw_accuracy, draw_frontier
from experiments.common.results import (
  options_of,
  pooled,
  print_end,
  print_rows,
  with_spread,
  write_results,
  write_whole,
)
from experiments.datasets.tasks import Task, load_task
from experiments.downstream.data import foreign_batches, foreign_task, load
from experiments.downstream.evaluation import LEAST_GAIN, recovered
from experiments.downstream.presets import SIZES, Preset, preset_of
from experiments.downstream.pretrained import Pretrained
from experiments.downstream.roads import ROADS
from experiments.downstream.seeds import baseline_row, run_seed

# Trained whatever is named: the teacher, and what it has to beat.
TRAINED = ("softmax", "sinkhorn")
_OPTIONS = "options.json"
# May differ when a run is resumed.
_FREE = ("out", "resume", "data_dir")


def main(arguments: Sequence[str] | None = None) -> None:
  # A run that is resumed is no empty directory: see `check_out`.
  parser = parser_for(__doc__, out=writable)
  add = parser.add_argument
  add("--dataset", required=True, help="its name in TFDS")
  add("--data-dir", type=pathlib.Path, help="with prepared data sets")
  add("--input-key", help="feature with the text or image")
  add("--label-key", help="feature with the class")
  add("--train-split")
  add("--test-split")
  add("--preset", choices=SIZES, help="tiny by default; of models from scratch")
  add("--init", help="pretrained encoder to fine-tune: minilm, or its directory")
  add("--frozen-layers", type=whole(0), help="first layers of it that are not trained")
  add("--distil-steps", type=whole(0), help="without labels, before fine-tuning it")
  add(
    "--roads",
    choices=ROADS,
    nargs="+",
    default=[],
    help="to Sinkhorn attention, to fine-tune as well; with --train-only",
  )
  add(
    "--attention",
    type=trainable,
    nargs="+",
    default=[],
    help="peers to train from scratch as well",
  )
  add("--slices", type=whole(1), default=8)
  add("--seeds", type=seed_list, default=[0, 1, 2], help="as 0,1,2")
  add("--train-only", action="store_true", help="replace no attention")
  add("--resume", action="store_true", help="go on with a killed run")
  add("--steps", type=whole(1), help="of training")
  add("--batch-size", type=whole(1), help="of training")
  add("--learning-rate", type=positive, help="the highest")
  add("--length", type=whole(1), help="tokens of a text")
  add("--refine-steps", type=whole(0), help="per layer; 0 for the ridge fit alone")
  add("--test-limit", type=whole(1), help="test examples at most")
  add("--shift-dataset", help="compile on its inputs, too, to see what shift does")
  args = parser.parse_args(arguments)
  started = time.perf_counter()
  if args.init is not None and args.preset is not None:
    parser.error("argument --preset: of models from scratch; leave it out with --init")
  for name in ("frozen_layers", "distil_steps", "roads"):
    if args.init is None and getattr(args, name) not in (None, []):
      parser.error(f"argument --{name.replace('_', '-')}: needs --init")
  if args.roads and not args.train_only:
    parser.error("argument --roads: needs --train-only")
  args.preset = args.preset or ("tiny" if args.init is None else "pretrained")
  option = "out"
  try:
    check_out(args)
    option = "dataset"
    task = load_task(
      args.dataset,
      data_dir=args.data_dir,
      input_key=args.input_key,
      label_key=args.label_key,
      train_split=args.train_split,
      test_split=args.test_split,
    )
    if args.init is not None:
      option = "init"
      if task.kind != "text":
        raise ValueError(f"{task.name} holds {task.kind}s: expected texts")
      Pretrained.named(args.init, preset_for(task, args), args.frozen_layers or 0)
    option, other = "shift-dataset", None
    if args.shift_dataset is not None:
      other = foreign_task(args.shift_dataset, task, args.data_dir)
  # A RuntimeError tells how to prepare the data set.
  except (ValueError, RuntimeError, argparse.ArgumentTypeError) as error:
    parser.error(f"argument --{option}: {error}")
  run(task, other, args, started)


def run(
  task: Task, other: Task | None, args: argparse.Namespace, started: float
) -> list[dict[str, Any]]:
  """The whole experiment; returns the rows that it writes to `out/results.json`.

  `other` are data to compile on as well; `started` is when the program was.
  """
  write_whole(args.out / _OPTIONS, json.dumps(options_of(args), indent=1))
  preset = preset_for(task, args)
  directory = args.out / args.dataset.replace("/", "-").replace(":", "-")
  cache = directory / "tokenizer"
  begun, coder = None, None
  if args.init is not None:
    begun = Pretrained.named(args.init, preset, args.frozen_layers or 0)
    coder = begun.coder(preset)
  data = load(task, preset, cache, args.test_limit, coder)
  foreign = None
  if other is not None:
    foreign = foreign_batches(other, task, data, preset, cache, coder)
  seconds = {"data": time.perf_counter() - started}
  names = list(dict.fromkeys((*TRAINED, *args.attention, *args.roads)))
  one = functools.partial(run_seed, data, foreign, preset, names, args)
  if begun is not None:
    make = lambda name, seed: begun.build(name, preset, data, seed)  # noqa: E731
    one = functools.partial(one, make=make)
  per_seed = [_kept(directory / f"seed{seed}", one, seed) for seed in args.seeds]
  linear = _kept(directory, lambda *_: baseline_row(task), 0, "linear.json")

  rows = pooled([each["rows"] for each in per_seed])
  share: dict[str, float | None] = {}
  if not args.train_only:
    share = recovered({row["method"]: row for row in rows})
  for row in rows:
    if row["method"] in share:
      row["recovered"] = share[row["method"]]
  rows.append(linear)
  rows += pooled([each["shift"] for each in per_seed])
  for name in ("train", "compile", "evaluate"):
    seconds[name] = sum(each["seconds"][name] for each in per_seed)
  # Of all processes that had a share in it.
  total = sum(seconds.values())
  for seed, each in zip(args.seeds, per_seed, strict=True):
    seconds[f"seed {seed}"] = sum(each["seconds"].values())
  seconds["total"] = total
  config = {**options_of(args), "preset_values": dataclasses.asdict(preset)}
  path = write_results(args.out, "downstream", config, rows, seconds)
  figures = [args.out / "accuracy.png"]
  title = f"downstream, {args.dataset}"
  draw_accuracy([(title, rows)], figures[0])
  if not args.train_only:
    figures.append(args.out / "frontier.png")
    draw_frontier(rows, figures[1], title=title)
  own = [row for row in rows if "shift" not in row]
  count = f"{len(task.test) if args.test_limit is None else args.test_limit}"
  print_rows(_shown(own), f"{task.name}, {count} test examples")
  shifted = _shown(row for row in rows if "shift" in row)
  if shifted:
    print_rows(shifted, "Inputs of another kind")
  if None in share.values():
    print(
      f"recovered is empty: the teacher gains less than {LEAST_GAIN} over softmax in "
      "its place"
    )
  print_end(seconds, path, *figures)
  return rows


def preset_for(task: Task, args: argparse.Namespace) -> Preset:
  """The preset of the arguments, with the values that they give."""
  own = ("steps", "distil_steps", "refine_steps", "batch_size", "learning_rate")
  given = {name: getattr(args, name) for name in (*own, "length")}
  given = {name: value for name, value in given.items() if value is not None}
  return dataclasses.replace(preset_of(args.preset, task.kind, task.name), **given)


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
    if args.resume:
      print(f"Nothing to resume in {args.out}: a new run starts")
    return
  before = json.loads(path.read_text())
  for name in options:
    if name not in _FREE and options[name] != before.get(name):
      raise ValueError(
        f"--{name.replace('_', '-')} is {options[name]}: the run in {args.out} had "
        f"{before.get(name)}; resume it with its own options, or name a new directory"
      )


def _kept(
  directory: pathlib.Path,
  make: Callable[[int, pathlib.Path], Any],
  seed: int,
  name: str = "rows.json",
) -> Any:
  """The result of `make`, or its earlier result where the run is resumed."""
  path = directory / name
  if not path.exists():
    write_whole(path, json.dumps(make(seed, directory), indent=1))
  return json.loads(path.read_text())


def _shown(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed: means over the seeds, and the spread of the accuracy."""
  names = ("method", "shift", "accuracy", "recovered", "tv", "kl", "column_error")
  shown = []
  for row in rows:
    cells = {name: row[name] for name in (*names, "milliseconds") if name in row}
    if "accuracy_std" in row:
      cells["accuracy"] = with_spread(row)
    shown.append(cells)
  return shown


if __name__ == "__main__":
  main()
