"""Saved models whose files are cut, flipped, absent, or of something else."""

import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

import asap_jax
from asap_jax.compiler.saving import folders, manifest
from experiments.stress.saved import blank, compiled, number_at, tally

Change = Callable[[bytes], bytes | None]


def damaged(folder: pathlib.Path, flips: int, seed: int) -> list[dict[str, Any]]:
  """Rows of a model with one file damaged: refused, or harmless and whole."""
  whole = folder / "whole"
  asap_jax.save(whole, compiled(1.0))
  drawn = random.Random(seed)
  files = sorted(file for file in whole.rglob("*") if file.is_file())
  rows = [
    _row("files cut", whole, [(f, _cut(n)) for f in files for n in _lengths(f, drawn)]),
    _row("files absent", whole, [(file, lambda data: None) for file in files]),
    _row(
      "bits flipped", whole, [(f, _flip(drawn)) for f in files for _ in range(flips)]
    ),
    _row("manifests altered", whole, _manifests(whole)),
  ]
  shutil.rmtree(folder)
  return rows


def _lengths(file: pathlib.Path, drawn: random.Random) -> list[int]:
  size = file.stat().st_size
  return sorted({0, 1, size // 2, size - 1, drawn.randrange(size)} if size > 1 else {0})


def _cut(length: int) -> Change:
  return lambda data: data[:length]


def _flip(drawn: random.Random) -> Change:
  def flip(data: bytes) -> bytes:
    if not data:
      return b"\x01"
    altered = bytearray(data)
    altered[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
    return bytes(altered)

  return flip


def _manifests(whole: pathlib.Path) -> list[tuple[pathlib.Path, Change]]:
  """Each field absent or of another kind, under a digest that is right."""
  file = whole / folders.MANIFEST
  content = json.loads(file.read_text())
  changes = []
  for field in content.keys() - {"digest"}:
    for value in (None, 0, "text", [], {}, [0], {"a": 0}, ...):
      altered = {k: v for k, v in content.items() if k not in ("digest", field)}
      if value is not ...:
        altered[field] = value
      altered["digest"] = manifest._digest(altered)
      changes.append((file, _instead(json.dumps(altered))))
  return changes


def _instead(text: str) -> Change:
  return lambda data: text.encode()


def _row(
  method: str, whole: pathlib.Path, changes: list[tuple[pathlib.Path, Change]]
) -> dict[str, Any]:
  row = tally(method, "told", "old")
  for file, change in changes:
    before = file.read_bytes()
    after = change(before)
    if after is None:
      file.unlink()
    else:
      file.write_bytes(after)
    row["tried"] += 1
    try:
      row["old" if number_at(whole) == 1.0 else "lost"] += 1
    except (ValueError, OSError) as error:
      row["told" if str(whole) in str(error) or "model" in str(error) else "lost"] += 1
    except Exception as error:
      print(f"{method}: {file.name}: {error!r}")
      row["lost"] += 1
    file.write_bytes(before)
  return row


def foreign(folder: pathlib.Path) -> dict[str, Any]:
  """What is no saved model: loading is refused, and saving leaves it as it is."""
  row = tally("foreign checkpoints", "told")
  for path in _foreign(folder):
    before = _contents(path)
    refused = 0
    for attempt in (
      lambda path=path: asap_jax.load(path, blank()),
      lambda path=path: asap_jax.save(path, compiled(1.0), overwrite=True),
    ):
      try:
        attempt()
      except (ValueError, OSError) as error:
        refused += str(path) in str(error)
    row["tried"] += 1
    row["told" if refused == 2 and _contents(path) == before else "lost"] += 1
  shutil.rmtree(folder)
  return row


def _foreign(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  folder.mkdir(parents=True)
  for name, files in {
    "empty": {},
    "application": {"manifest.json": '{"name": "an application", "format": 3}'},
    "list": {"manifest.json": "[]"},
    "weights": {"model.safetensors": "{}", "config.json": "{}"},
    "hidden": {"arrays": "a file of this name", "manifest.json": "{}"},
  }.items():
    (folder / name).mkdir()
    for file, text in files.items():
      (folder / name / file).write_text(text)
    yield folder / name
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "orbax", {"weights": np.ones(3)})
  yield folder / "orbax"
  np.savez(folder / "arrays.npz", weights=np.ones(3))
  yield folder / "arrays.npz"


def _contents(path: pathlib.Path) -> dict[str, bytes]:
  files = [path] if path.is_file() else path.rglob("*")
  return {str(file): file.read_bytes() for file in files if file.is_file()}
