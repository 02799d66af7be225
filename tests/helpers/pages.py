"""The pages of this project, and the code that they show."""

import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def examples(page: pathlib.Path) -> list[str]:
  """The Python blocks of a page."""
  return re.findall(
    r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
  )


def run_examples(page: pathlib.Path) -> dict[str, Any]:
  """Runs the blocks of a page in turn; the names that they leave behind."""
  names: dict[str, Any] = {"__name__": page.stem}
  for block in examples(page):
    exec(compile(block, str(page), "exec"), names)
  return names


def figures(page: pathlib.Path) -> list[pathlib.Path]:
  """The image files that a page shows."""
  return [
    page.parent / path for path in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
  ]
