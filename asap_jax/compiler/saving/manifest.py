"""The manifest of a saved model: JSON that names everything, under one digest."""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import asap_jax
from asap_jax.compiler.saving.folders import ARRAYS, MANIFEST, is_version

# 2: one version, in `arrays/`; options as they print, names of arrays as they are.
FORMAT, OLDEST = 3, 2
_PACKAGES = "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"
_FIELDS = {"sites": list, "arrays": dict, "keys": dict, "files": dict}
_LATER = {"folder": str, "values": dict, "host": dict, "modes": list, "watches": list}


def versions() -> dict[str, str]:
  """Of this package, of Python, and of all that has a part in a saved model."""
  of_packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    "asap_jax": asap_jax.__version__,
    "python": platform.python_version(),
    **of_packages,
  }


def to_text(content: dict[str, Any]) -> str:
  """A manifest of the present format, with its digest."""
  content = {"format": FORMAT, **content}
  return json.dumps({**content, "digest": _digest(content)}, indent=1)


def read(path: pathlib.Path) -> dict[str, Any]:
  """The manifest of the model at `path`, of whatever format, in fields of the present.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is truncated, altered, none of ours, or of a format that is not
      read here.
  """
  try:
    data = (path / MANIFEST).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(
      f"path={path}: no saved model there ({MANIFEST} is absent)"
    ) from None
  altered = f"path={path}: {MANIFEST} is truncated or altered"
  try:
    manifest = json.loads(data)
  except ValueError:
    raise ValueError(f"{altered}: it is no JSON") from None
  if not isinstance(manifest, dict) or not {"format", "digest"} <= manifest.keys():
    raise ValueError(f"{altered}, or none of asap_jax: it has no format and no digest")
  written = manifest["format"]
  if type(written) is not int or not OLDEST <= written <= FORMAT:
    raise ValueError(_unreadable(path, manifest))
  if manifest.pop("digest") != _digest(manifest):
    raise ValueError(f"{altered}: its digest is another")
  expected = _FIELDS | (_LATER if written > OLDEST else {})
  for field, kind in expected.items():
    if not isinstance(manifest.get(field), kind):
      raise ValueError(f"{altered}: its field {field!r} is no {kind.__name__}")
  if written > OLDEST and not is_version(manifest["folder"]):
    raise ValueError(f"{altered}: its field 'folder' names no version")
  for field, is_right in _CONTENT.items():
    if not is_right(manifest.get(field)):
      raise ValueError(f"{altered}: its field {field!r} holds something else")
  manifest.setdefault("folder", "")
  return manifest


def _all(of: Any, is_right: Callable[[Any], bool]) -> bool:
  return of is None or all(map(is_right, of.values() if isinstance(of, dict) else of))


def _is_array(each: Any) -> bool:
  return (
    isinstance(each, list)
    and len(each) == 2
    and isinstance(each[0], list)
    and all(type(size) is int and size >= 0 for size in each[0])
    and isinstance(each[1], str)
  )


def _is_site(each: Any) -> bool:
  return (
    isinstance(each, dict)
    and isinstance(each.get("path"), list)
    and isinstance(each.get("attribute"), str | int)
    and isinstance(each.get("options"), dict)
    and isinstance(each.get("record", {}), dict)
  )


def _is_mode(each: Any) -> bool:
  return isinstance(each, list) and [type(part) for part in each] == [list, str, bool]


# Under a right digest they are as somebody else wrote them.
_CONTENT: dict[str, Callable[[Any], bool]] = {
  "sites": lambda of: _all(of, _is_site),
  "arrays": lambda of: _all(of, _is_array),
  "keys": lambda of: _all(of, lambda each: isinstance(each, str)),
  "files": lambda of: _all(of, lambda each: isinstance(each, str)),
  "host": lambda of: _all(of, lambda each: each in ("array", "number")),
  "values": lambda of: _all(
    of, lambda each: isinstance(each, bool | int | float | str)
  ),
  "modes": lambda of: _all(of, _is_mode),
  "device": lambda of: of is None or isinstance(of, str),
}


def _unreadable(path: pathlib.Path, manifest: dict[str, Any]) -> str:
  written, by = manifest["format"], manifest.get("versions")
  known = by.get("asap_jax", "unknown") if isinstance(by, dict) else "unknown"
  what_to_do = "load it with the version that wrote it, and compile again here"
  if type(written) is int and written > FORMAT:
    what_to_do = "update asap_jax here, or save with this version there"
  return (
    f"path={path} has format {written}, written by asap_jax {known}: this version, "
    f"{asap_jax.__version__}, reads {OLDEST} to {FORMAT}; {what_to_do}"
  )


def home(path: pathlib.Path, manifest: dict[str, Any]) -> pathlib.Path:
  """The folder that has the arrays of a model, and what else its digests name."""
  return path / manifest["folder"]


def check_files(path: pathlib.Path, manifest: dict[str, Any]) -> None:
  """Raises ValueError unless every file is as it was written."""
  present, files = digests(home(path, manifest)), manifest["files"]
  broken = [name for name, digest in files.items() if present.get(name) != digest]
  if broken:
    raise ValueError(f"path={path}: truncated, altered or absent: {', '.join(broken)}")


def digests(folder: pathlib.Path) -> dict[str, str]:
  """Of every file of the arrays in a folder, by its path there."""
  found = {}
  for file in sorted((folder / ARRAYS).rglob("*")):
    if file.is_file():
      with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
      found[file.relative_to(folder).as_posix()] = digest
  return found


def _digest(manifest: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
