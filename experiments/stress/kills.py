"""Processes that are killed while they save, at drawn times and at drawn steps."""

import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import jax

import asap_jax
from experiments.stress.saved import compiled, litter, number_at, tally

# What changes something on the disk, or is about to.
_STEPS = "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"


def forks() -> Any:
  """Processes that have imported all before they start, and started no device."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["experiments.stress.kills"])
  return context


def saves(
  path: pathlib.Path, number: float, overwrite: bool, step: int | None, told: Connection
) -> None:
  """Saves a model, and kills itself before a step; tells when it begins and ends."""
  model = compiled(number)
  jax.block_until_ready(model.body[...])
  count, begun, folder = 0, False, os.fspath(path.parent)

  def at_step(event: str, arguments: tuple) -> None:
    nonlocal count
    if begun and event in _STEPS and str(arguments[0]).startswith(folder):
      if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
      count += 1

  sys.addaudithook(at_step)
  told.send(None)
  begun, start = True, time.perf_counter()
  asap_jax.save(path, model, overwrite=overwrite)
  begun = False
  told.send((count, time.perf_counter() - start))


def killed(folder: pathlib.Path, tries: int, seed: int) -> list[dict[str, Any]]:
  """Rows of saves that were killed: onto nothing, and onto a model."""
  return [
    _killed(folder / method.replace(" ", "_"), method, overwrite, tries // 2, seed)
    for method, overwrite in (("killed, new", False), ("killed, replacing", True))
  ]


def _killed(
  folder: pathlib.Path, method: str, overwrite: bool, tries: int, seed: int
) -> dict[str, Any]:
  context, drawn = forks(), random.Random(seed)
  path = folder / "model"
  row = tally(method, "old", "new", "litter")
  steps, seconds = _prepared(path, overwrite, context)
  for count in range(tries):
    _reset(path, overwrite)
    step = drawn.randrange(steps) if count % 2 else None
    delay = drawn.uniform(0, 1.1 * seconds)
    _run(context, path, overwrite, step, delay)
    row["tried"] += 1
    try:
      found = number_at(path) if path.exists() else 0.0
      wanted = {1.0: "old", 2.0: "new"} if overwrite else {0.0: "old", 2.0: "new"}
      row[wanted[found]] += 1
    except (ValueError, OSError, KeyError) as error:
      print(f"{method}, step {step}, {delay:.3f} s: {error!r}")
      row["lost"] += 1
    asap_jax.save(path, compiled(3.0), overwrite=True)
    row["lost"] += number_at(path) != 3.0
    row["litter"] += litter(path)
  shutil.rmtree(folder)
  return row


def _reset(path: pathlib.Path, overwrite: bool) -> None:
  shutil.rmtree(path.parent, ignore_errors=True)
  path.parent.mkdir(parents=True)
  if overwrite:
    asap_jax.save(path, compiled(1.0))


def _prepared(path: pathlib.Path, overwrite: bool, context: Any) -> tuple[int, float]:
  """Steps and seconds of a save that nobody stops."""
  for _ in range(2):  # the first imports what the others have
    _reset(path, overwrite)
    found = _run(context, path, overwrite, None, None)
  if found is None:
    raise RuntimeError("a save that nobody stops does not end")
  return found


def _run(
  context: Any,
  path: pathlib.Path,
  overwrite: bool,
  step: int | None,
  delay: float | None,
) -> tuple[int, float] | None:
  """What a save tells at its end; `None` if it was killed."""
  ours, theirs = context.Pipe()
  process = context.Process(target=saves, args=(path, 2.0, overwrite, step, theirs))
  process.start()
  theirs.close()
  try:
    ours.recv()
    if step is None and delay is not None:
      time.sleep(delay)
      process.kill()
    return ours.recv()
  except EOFError:
    return None
  finally:
    process.join()
    ours.close()
