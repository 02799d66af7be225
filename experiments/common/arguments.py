"""Arguments of experiments: what makes no sense ends in one line, before any work."""

import argparse
import pathlib
import tempfile
from collections.abc import Callable

MOST_SEED = 2**32 - 1


def parser_for(
  description: str | None, out: Callable[[str], pathlib.Path] | None = None
) -> argparse.ArgumentParser:
  """A parser with `--out`, whose type is `new_directory` by default.

  Its help is the first line of `description`, the docstring of a module.
  """
  summary = (description or "").partition("\n")[0]
  parser = argparse.ArgumentParser(description=summary)
  out = out or new_directory
  parser.add_argument("--out", type=out, required=True, help="new directory")
  return parser


def add_seed(parser: argparse.ArgumentParser) -> None:
  """Adds `--seed`, 0 by default."""
  parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
  """Type of an argument: an integer from `least` to `most`, both included."""
  wanted = f"{least} up" if most is None else f"{least} to {most}"

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least or (most is not None and value > most):
      raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {wanted}")
    return value

  return parse


def positive(text: str) -> float:
  """Type of an argument: a finite number above zero."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above zero")
  return value


def seed_list(text: str) -> list[int]:
  """Type of an argument: seeds, as `0,1,2`."""
  try:
    return [whole(0, MOST_SEED)(part) for part in text.split(",")]
  except argparse.ArgumentTypeError as error:
    raise argparse.ArgumentTypeError(f"expected seeds as 0,1,2: {error}") from None


def file(text: str) -> pathlib.Path:
  """Type of an argument: a file that is there."""
  path = pathlib.Path(text)
  if not path.is_file():
    raise argparse.ArgumentTypeError(f"{path} is not a file")
  return path


def new_directory(text: str) -> pathlib.Path:
  """Type of an argument: a directory that holds nothing yet and can be written to.

  Results are not overwritten. The directory is not made yet, since other arguments may
  still be refused.
  """
  path = writable(text)
  if path.exists() and any(path.iterdir()):
    raise argparse.ArgumentTypeError(f"{path} is not empty: name a new directory")
  return path


def writable(text: str) -> pathlib.Path:
  """Type of an argument: a directory that can be written to, or made."""
  path = pathlib.Path(text)
  try:
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    # Writing is tried, since permissions do not tell of file systems for reading only.
    with tempfile.TemporaryFile(dir=there):
      return path
  except OSError as error:
    raise argparse.ArgumentTypeError(
      f"{path} cannot be written to ({error.strerror}): name a new directory"
    ) from None
