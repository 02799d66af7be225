"""Names of a saved model in the model it is loaded into, where they were changed."""

from collections.abc import Mapping, Sequence
from typing import Any


class Names:
  """Where things are now: parts of paths, told apart by dots.

  The longest old path that something begins with counts.

  Args:
    changed: new paths by old ones.

  >>> names = Names({"blocks": "encoder.layers", "blocks.0.fc": "encoder.layers.0.mlp"})
  >>> names.now(["blocks", 1, "fc"]), names.now(["blocks", 0, "fc", "kernel"])
  (('encoder', 'layers', '1', 'fc'), ('encoder', 'layers', '0', 'mlp', 'kernel'))
  """

  def __init__(self, changed: Mapping[str, str] | None):
    self._changed = {
      tuple(old.split(".")): tuple(new.split("."))
      for old, new in (changed or {}).items()
    }
    self._used: set[tuple[str, ...]] = set()

  def now(self, path: Sequence[Any]) -> tuple[str, ...]:
    """The path of what had this one when it was saved."""
    parts = tuple(map(str, path))
    for length in range(len(parts), 0, -1):
      if parts[:length] in self._changed:
        self._used.add(parts[:length])
        return self._changed[parts[:length]] + parts[length:]
    return parts

  def check_used(self) -> None:
    """Raises ValueError if an old path is none of the saved model's."""
    unknown = [".".join(old) for old in self._changed.keys() - self._used]
    if unknown:
      raise ValueError(f"names: the saved model has nothing at {', '.join(unknown)}")
