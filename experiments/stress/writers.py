"""Writers at one path at once, and readers meanwhile."""

import itertools
import pathlib
import shutil
import time
from multiprocessing.connection import Connection
from typing import Any

import asap_jax
from experiments.stress.kills import forks
from experiments.stress.saved import compiled, litter, number_at, tally


def writes(
  path: pathlib.Path, numbers: list[float], overwrite: bool, told: Connection
) -> None:
  """Saves models when it is told to; tells what came of it."""
  models = [compiled(number) for number in numbers]
  told.send(None)
  told.recv()
  try:
    for model in models:
      asap_jax.save(path, model, overwrite=overwrite)
    told.send("saved")
  except FileExistsError:
    told.send("told")
  except Exception as error:
    told.send(repr(error))


def reads(path: pathlib.Path, times: int, told: Connection) -> None:
  """Loads the model again and again; tells which ones it found."""
  told.send(None)
  told.recv()
  try:
    told.send([number_at(path) for _ in range(times)])
  except Exception as error:
    told.send(repr(error))


def together(targets: list[tuple[Any, tuple]]) -> list[Any]:
  """What processes tell that begin at once."""
  context = forks()
  pipes, processes = [], []
  for target, arguments in targets:
    ours, theirs = context.Pipe()
    processes.append(context.Process(target=target, args=(*arguments, theirs)))
    processes[-1].start()
    theirs.close()
    pipes.append(ours)
  for pipe in pipes:
    pipe.recv()
  for pipe in pipes:
    pipe.send(None)
  found = [pipe.recv() for pipe in pipes]
  for process in processes:
    process.join()
  return found


def two_writers(folder: pathlib.Path, tries: int) -> list[dict[str, Any]]:
  """Rows of two writers of a new model, and of two that replace one."""
  rows = []
  for method, overwrite in (("two writers, new", False), ("two, replacing", True)):
    row = tally(method, "told", "new", "litter")
    for _ in range(tries):
      shutil.rmtree(folder, ignore_errors=True)
      path = folder / "model"
      folder.mkdir(parents=True)
      if overwrite:
        asap_jax.save(path, compiled(0.0))
      found = together([(writes, (path, [n], overwrite)) for n in (1.0, 2.0)])
      row["tried"] += 1
      expected = ["saved", "saved"] if overwrite else ["saved", "told"]
      if sorted(found) != expected:
        print(f"{method}: {found}")
        row["lost"] += 1
      elif overwrite:
        row["new" if number_at(path) in (1.0, 2.0) else "lost"] += 1
      else:  # the one who was not told
        row["told"] += 1
        right = number_at(path) == 1.0 + found.index("saved")
        row["new" if right else "lost"] += 1
      row["litter"] += litter(path)
    rows.append(row)
  shutil.rmtree(folder)
  return rows


def readers(folder: pathlib.Path, writes_of: int, reads_of: int) -> dict[str, Any]:
  """The row of a reader while another replaces the model."""
  path = folder / "model"
  folder.mkdir(parents=True)
  asap_jax.save(path, compiled(0.0))
  numbers = [float(n) for n in range(1, writes_of + 1)]
  start = time.perf_counter()
  said, found = together([(writes, (path, numbers, True)), (reads, (path, reads_of))])
  print(f"{len(set(found))} models were read in {time.perf_counter() - start:.0f} s")
  row = tally("read meanwhile", "new") | {"tried": reads_of}
  if said != "saved" or isinstance(found, str):
    print(said, found)
    row["lost"] = reads_of
  else:
    # Whole models only, and never an older one after a newer one.
    row["lost"] = sum(b < a for a, b in itertools.pairwise(found))
    row["new"] = reads_of - row["lost"]
  asap_jax.save(path, compiled(0.0), overwrite=True)
  row["litter"] = litter(path)
  shutil.rmtree(folder)
  return row
