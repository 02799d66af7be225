"""Files that are written whole or not at all."""

import os
import pathlib
import uuid

Path = str | os.PathLike[str]


def check_free(path: Path | None, overwrite: bool) -> None:
  """Raises FileExistsError where there is a file that is not to be replaced."""
  if path is None:
    return
  found = pathlib.Path(path).expanduser()
  if found.is_dir():
    raise FileExistsError(f"path={path} is a directory: expected a file's name")
  if found.exists() and not overwrite:
    raise FileExistsError(
      f"path={path} exists already: pass overwrite=True to replace it"
    )


def write_whole(path: Path, content: bytes, overwrite: bool) -> None:
  """Writes a file beside its place and moves it there; folders are made if need be.

  Raises:
    FileExistsError: as `check_free`.
  """
  target = pathlib.Path(path).expanduser().absolute()
  target.parent.mkdir(parents=True, exist_ok=True)
  # In the same folder, hence on the same file system, where renaming is atomic.
  aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
  try:
    with aside.open("xb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    check_free(target, overwrite)
    os.replace(aside, target)
  finally:
    aside.unlink(missing_ok=True)
