"""Fill the tables of README.md and of the pages here from the results.json beside them.

python docs/measurements/tables.py [--take RUN NAME]  copies a run to NAME here before

A comment says what a table shows; where the comment `end` follows, it is filled in:

<!-- table: quickstart/results.json
column: attention
column: ms at 128 | length=128 milliseconds | .1f
row: **the teacher** | method=sinkhorn
-->

A cell shows that entry, in that format, of the one row of the file which has the values
that column and row ask for (`shift=`: no such entry). A column may name another file,
and divide (`temp_bytes/1048576`). `<!-- run: FILE -->` is followed by where it ran. A
description that begins with `to come:` waits for its run. Of an entry that is a list
`name[-1]` shows the last.
"""

import argparse
import datetime
import json
import pathlib
import re
import shlex
import shutil
from typing import Any

HERE = pathlib.Path(__file__).parent
PAGES = (HERE.parent.parent / "README.md", *sorted(HERE.glob("*.md")))
BLOCK = re.compile(r"(<!-- (table|run): (\S+)(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
  """The text of a page, its tables filled; a ValueError at what a file lacks."""

  def block(match: re.Match[str]) -> str:
    opening, kind, file, description, closing = match.groups()
    if not all((HERE / name).is_file() for name in files(match[0])):
      return match[0]
    made = _table(file, description) if kind == "table" else _run(file)
    return f"{opening}\n{made}\n\n{closing}"

  return BLOCK.sub(block, text)


def files(text: str) -> set[str]:
  """Files that the comments of a page name, relative to this folder."""
  named = (f"{file} {rest}" for _, _, file, rest, _ in BLOCK.findall(text))
  return set(re.findall(r"\S+\.json", "".join(named)))


def _table(file: str, description: str) -> str:
  parts: dict[str, list[list[str]]] = {"column": [], "row": []}
  for line in description.strip().splitlines():
    kind, _, text = line.partition(": ")
    parts[kind].append(text.split(" | "))
  (first,), *columns = parts["column"]
  table = [[first, *(column[0] for column in columns)], ["---"] * (len(columns) + 1)]
  for label, asked in parts["row"]:
    table.append([label, *(_cell(file, asked, *shown) for _, *shown in columns)])
  for name, *cells in (*table[2:], *zip(table[0], *table[2:], strict=True)):
    if not any(cells):
      raise ValueError(f"{name}: nothing of this is in {file}")
  return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _cell(file: str, asked: str, shown: str, form: str) -> str:
  *words, name = shlex.split(f"{asked} {shown}")
  name, _, divisor = name.partition("/")
  file = next((word for word in words if word.endswith(".json")), file)
  rows = _read(file)["rows"]
  for key, _, value in (word.partition("=") for word in words if "=" in word):
    rows = [row for row in rows if str(row.get(key, "")) == value]
  if len(rows) > 1:
    raise ValueError(f"{asked} {shown}: {len(rows)} rows of {file}")
  name, _, index = name.partition("[")
  if not rows or rows[0].get(name) is None:
    return ""
  value = rows[0][name][int(index.rstrip("]"))] if index else rows[0][name]
  # z: no minus before a zero.
  text = format(value / float(divisor or 1), f"z{form}")
  spread = rows[0].get(f"{name}_std")
  return text if spread is None else f"{text} ± {spread:{form}}"


def _run(file: str) -> str:
  place, config, seconds = map(_read(file).get, ("environment", "config", "seconds"))
  seeds = config.get("seeds", [config["seed"]] if "seed" in config else [])
  # What is only compiled draws nothing, and has no seed.
  seed = f"seed {', '.join(map(str, seeds))}, " if seeds else ""
  return (
    f"Run of {place['date']} at commit `{place['commit']}`: {place['device_kind']}, "
    f"{place['cpu_count']} cores, Python {place['python']}, JAX {place['jax']}, "
    f"{seed}{seconds['total']:.0f} s in all."
  )


def _read(file: str) -> dict[str, Any]:
  return json.loads((HERE / file).read_text())


def take(run: pathlib.Path, to: pathlib.Path) -> None:
  """Copies results and pictures of a run; of paths in its options the last part."""
  results = json.loads((run / "results.json").read_text())
  date = datetime.date.fromtimestamp((run / "results.json").stat().st_mtime)
  results["environment"].setdefault("date", str(date))
  for name, value in results["config"].items():
    if isinstance(value, str) and value.startswith("/"):
      results["config"][name] = pathlib.Path(value).name
  to.mkdir(parents=True, exist_ok=True)
  (to / "results.json").write_text(json.dumps(results, indent=1) + "\n")
  shown = "".join(page.read_text() for page in PAGES)
  for picture in run.glob("*.png"):
    if f"{to.name}/{picture.name})" in shown:
      shutil.copy(picture, to)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--take", nargs=2, metavar=("RUN", "NAME"))
  if taken := parser.parse_args().take:
    take(pathlib.Path(taken[0]), HERE / taken[1])
  for page in PAGES:
    page.write_text(filled(page.read_text()))
