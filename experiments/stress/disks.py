"""File systems that are full, or that cannot be written to.

python -m experiments.stress.disks FOLDER TRIES, in a name space of its own
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import asap_jax
from experiments.stress.saved import compiled, litter, number_at, tally

# A model takes about 120 KiB on the disk.
_LEAST, _MOST = 4, 240


def disks(tries: int) -> list[dict[str, Any]]:
  """Rows of file systems of many sizes; nothing where none can be mounted.

  Linux lets everybody mount one in memory, in a name space of one's own, unless it is
  forbidden there.
  """
  with tempfile.TemporaryDirectory() as folder:
    own = [sys.executable, "-m", "experiments.stress.disks", folder, str(tries)]
    try:
      found = subprocess.run(
        ["unshare", "--map-root-user", "--mount", *own], capture_output=True, text=True
      )
    except FileNotFoundError:
      return []
  if found.returncode != 0:
    print(f"No disk was filled: {found.stderr[-500:]}")
    return []
  print(found.stderr, end="")
  return json.loads(found.stdout.splitlines()[-1])


def _mount(folder: str, options: str) -> None:
  subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def _filled(folder: str, tries: int) -> list[dict[str, Any]]:
  row = tally("disk full", "told", "new", "litter")
  for count in range(tries):
    _mount(folder, "size=4m")
    path = pathlib.Path(folder) / "in" / "model"
    asap_jax.save(path, compiled(1.0))
    free = _LEAST + (_MOST - _LEAST) * count // tries
    filler = pathlib.Path(folder) / "filler"
    used = _used_kib(folder)
    filler.write_bytes(bytes(1024 * (4096 - used - free)))
    row["tried"] += 1
    try:
      asap_jax.save(path, compiled(2.0), overwrite=True)
      row["new" if number_at(path) == 2.0 else "lost"] += 1
    except OSError as error:
      brief = len(str(error)) < 500 and number_at(path) == 1.0
      row["told" if brief else "lost"] += 1
    left = litter(path)
    row["litter"] += left
    if left:
      print(count, free, sorted(map(str, path.parent.rglob("*"))), file=sys.stderr)
    subprocess.run(["umount", folder], check=True)
  return [row]


def _used_kib(folder: str) -> int:
  told = subprocess.run(
    ["df", "--output=used", "-k", folder], capture_output=True, text=True, check=True
  )
  return int(told.stdout.split()[-1])


def _read_only(folder: str) -> dict[str, Any]:
  row = tally("disk for reading only", "told", "old")
  _mount(folder, "size=4m")
  path = pathlib.Path(folder) / "model"
  asap_jax.save(path, compiled(1.0))
  _mount(folder, "remount,ro")
  for where, overwrite in ((path, True), (path.with_name("other"), False)):
    row["tried"] += 1
    try:
      asap_jax.save(where, compiled(2.0), overwrite=overwrite)
      row["lost"] += 1
    except OSError:
      row["told"] += 1
  row["tried"] += 1
  row["old" if number_at(path) == 1.0 else "lost"] += 1
  subprocess.run(["umount", folder], check=True)
  return row


if __name__ == "__main__":
  rows = _filled(sys.argv[1], int(sys.argv[2]))
  print(json.dumps([*rows, _read_only(sys.argv[1])]))
