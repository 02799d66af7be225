"""One saved model in one folder, which is replaced in one step.

    model/manifest.json       names the version that counts
    model/v-<token>/arrays/   its arrays
    model/v-<token>/lock      held by whoever writes or reads that version

A new version is written beside the old one. What replaces it is one rename of the
manifest, or of the whole folder where there was none: whoever is stopped, at whatever
step, leaves the old model or the new one. Versions that no manifest names and nobody
holds are litter, and the next save clears them. Locks end with their process.
"""

import contextlib
import importlib
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import Any

fcntl: Any
try:
  fcntl = importlib.import_module("fcntl")
except ImportError:  # on Windows: nothing is held there, and nothing is cleared
  fcntl = None

MANIFEST, ARRAYS, LOCK = "manifest.json", "arrays", "lock"
_VERSION = re.compile(r"v-[0-9a-f]{16}")
_TRIES = 100


def local(path: str | os.PathLike[str]) -> pathlib.Path:
  """The absolute path of a folder on a file system, `~` expanded.

  Raises:
    ValueError: for the address of a remote store.
  """
  text = os.fspath(path)
  # `pathlib` makes one slash of two.
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
    raise ValueError(
      f"path={text}: expected a folder of a file system, for only there one rename "
      "replaces a model; save to one, and copy it"
    )
  return pathlib.Path(text).expanduser().absolute()


def is_version(name: object) -> bool:
  """Whether a folder is named as one version of a model."""
  return isinstance(name, str) and _VERSION.fullmatch(name) is not None


def is_model(path: pathlib.Path) -> bool:
  """Whether a folder is a saved model, a damaged one too.

  A manifest alone may be that of anything.
  """
  if not (path / MANIFEST).is_file():
    return False
  return _is_old_arrays(path / ARRAYS) or any(_versions(path))


def check_free(path: pathlib.Path, overwrite: bool) -> None:
  """Raises FileExistsError where a model may not be written."""
  if os.path.lexists(path) and not (overwrite and is_model(path)):
    reason = (
      "is not a saved model" if overwrite else "pass overwrite=True to replace it"
    )
    raise FileExistsError(f"path={path} exists already: {reason}")


@contextlib.contextmanager
def new_version(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """An empty folder for a version of the model at `path`, held meanwhile.

  Unless it is published, nothing of it remains.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  for _ in range(_TRIES):
    token = secrets.token_hex(8)
    aside = None if path.is_dir() else path.with_name(f".{path.name}.{token}.saving")
    version = (aside or path) / f"v-{token}"
    # Somebody may clear it, or the folder for it, before it is held.
    with contextlib.suppress(FileNotFoundError):
      # Unlike those of `tempfile`, folders that the umask's may read.
      version.mkdir(parents=True)
    held = _hold(version, alone=True)
    if version.is_dir():
      break
    _let_go(held)
  else:
    raise OSError(f"path={path}: another process clears what is written here")
  try:
    yield version
  finally:
    try:
      if not _is_named(version):
        _remove(version)
      if aside is not None:
        _remove(aside)
    finally:
      _let_go(held)


def publish(
  version: pathlib.Path, path: pathlib.Path, manifest: str, *, overwrite: bool
) -> None:
  """Makes a version the one that counts, and is whole on the disk.

  Raises:
    FileExistsError: if another model came to stand at `path` meanwhile, and
      `overwrite` is false.
  """
  for file in version.rglob("*"):
    _to_disk(file)
  staged = version / MANIFEST
  staged.write_text(manifest, encoding="utf-8")
  _to_disk(staged)
  aside = version.parent
  if aside == path:
    check_free(path, overwrite)
    os.replace(staged, path / MANIFEST)
  else:
    os.replace(staged, aside / MANIFEST)
    try:
      # Onto a folder that holds something this fails, whoever was faster.
      os.rename(aside, path)
    except OSError:
      if not os.path.lexists(path):
        raise
      check_free(path, overwrite)
      os.rename(version, path / version.name)
      os.replace(aside / MANIFEST, path / MANIFEST)
  _to_disk(path)
  _to_disk(path.parent)


@contextlib.contextmanager
def reading(version: pathlib.Path) -> Iterator[None]:
  """Keeps a version from being cleared, where the file system can."""
  # Its writer holds it for a moment longer: nothing waits for that.
  held = _hold(version, alone=False, wait=False)
  try:
    yield
  finally:
    _let_go(held)


def clear_litter(path: pathlib.Path) -> None:
  """Removes versions that no manifest names and no process holds."""
  if fcntl is None:
    return
  has_old, has_new = _is_old_arrays(path / ARRAYS), any(map(_is_named, _versions(path)))
  # Of a damaged manifest nothing is known.
  if has_old or has_new:
    for version in _versions(path):
      _clear(version)
  if has_old and has_new:
    shutil.rmtree(path / ARRAYS, ignore_errors=True)
  # Names that patterns would take for such are compared as they are.
  name = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.saving")
  with contextlib.suppress(OSError):
    for aside in path.parent.iterdir():
      if name.fullmatch(aside.name):
        for version in _versions(aside):
          _clear(version, whatever=True)
        # Of a save that is stopped before its first version, or after its last.
        if not any(_versions(aside)):
          shutil.rmtree(aside, ignore_errors=True)


def _clear(version: pathlib.Path, *, whatever: bool = False) -> None:
  """Removes one version, unless it is named or held."""
  held = _hold(version, alone=True, wait=False)
  if held is None:
    return
  try:
    # Looked at only now: whoever published it has let go since.
    if whatever or not _is_named(version):
      shutil.rmtree(version, ignore_errors=True)
  finally:
    _let_go(held)


def _remove(folder: pathlib.Path) -> None:
  """Removes what this process wrote; Orbax may write on where it failed."""
  for _ in range(_TRIES):
    if not folder.exists():
      return
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.05)


def _versions(home: pathlib.Path) -> list[pathlib.Path]:
  if not home.is_dir():
    return []
  return [folder for folder in home.iterdir() if is_version(folder.name)]


def _is_named(version: pathlib.Path) -> bool:
  """Whether the manifest beside a version speaks of it."""
  try:
    return version.name in (version.parent / MANIFEST).read_text("utf-8", "replace")
  except FileNotFoundError:
    return False


def _is_old_arrays(folder: pathlib.Path) -> bool:
  """Arrays of a model of format 2, which had one version."""
  return (folder / "_METADATA").is_file() or (folder / "_CHECKPOINT_METADATA").is_file()


def _hold(version: pathlib.Path, *, alone: bool, wait: bool = True) -> int | None:
  """A descriptor that holds a version, or `None` where it cannot be held."""
  if fcntl is None:
    return None
  try:
    flags = os.O_RDWR | os.O_CREAT if alone else os.O_RDONLY
    held = os.open(version / LOCK, flags, 0o666)
  except OSError:  # of another format, or not to be written
    return None
  try:
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    fcntl.flock(held, kind if wait else kind | fcntl.LOCK_NB)
    there = os.stat(version / LOCK)
    if (there.st_dev, there.st_ino) == (os.fstat(held).st_dev, os.fstat(held).st_ino):
      return held
  except OSError:
    pass
  os.close(held)
  return None


def _let_go(held: int | None) -> None:
  if held is not None:
    os.close(held)


def _to_disk(file: pathlib.Path) -> None:
  """Waits until a file or a folder is written, as a rename of others must."""
  if os.name != "posix":
    return
  descriptor = os.open(file, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
