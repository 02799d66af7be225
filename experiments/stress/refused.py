"""Bad arguments of every public entry: a ValueError that names the argument."""

from typing import Any

from experiments.stress.entries import entries
from experiments.stress.samples import Entry
from experiments.stress.saved import tally


def refused() -> list[dict[str, Any]]:
  """The row of all bad arguments."""
  row = tally("bad arguments", "told")
  for name, entry in entries().items():
    for argument, found in entry.bad.items():
      for value in found:
        said = said_of(entry, argument, value)
        row["tried"] += 1
        row["lost" if said else "told"] += 1
        if said:
          print(f"{name}({argument}={str(value)[:60]}): {said}")
  return [row]


def said_of(entry: Entry, argument: str, value: Any) -> str | None:
  """What went wrong where a bad argument is given; `None` if it was refused well."""
  try:
    entry.call(**{**entry.good, argument: value})
  except ValueError as error:
    told = argument in str(error)
    return None if told else f"a ValueError without its name: {str(error)[:200]}"
  except Exception as error:
    return f"{type(error).__name__}: {str(error)[:200]}"
  return "taken"
