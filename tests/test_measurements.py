"""Tables show what was measured, and commands are those of the experiments."""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex

import pytest
from helpers.pages import ROOT, figures

FOLDER = ROOT / "docs" / "measurements"
_spec = importlib.util.spec_from_file_location("tables", FOLDER / "tables.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)

PAGES = pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
_COMMAND = re.compile(r"-m experiments\.(\w+) ([^\n`]*)")


def commands(page):
  return [
    (name, shlex.split(options)) for name, options in _COMMAND.findall(page.read_text())
  ]


def parsed(name, options, monkeypatch):
  """What the parser of an experiment makes of options, without running it.

  Files that are asked for are there, and empty.
  """
  for option in options:
    if option.endswith(".npz"):
      pathlib.Path(option).touch()
  whole = argparse.ArgumentParser.parse_args

  def parse_and_stop(self, *given):
    raise Parsed(whole(self, *given))

  try:
    module = importlib.import_module(f"experiments.{name}.__main__")
  except ModuleNotFoundError:  # no folder
    module = importlib.import_module(f"experiments.{name}")
  monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
  with pytest.raises(Parsed) as stopped:
    module.main(options)
  return vars(stopped.value.args[0])


class Parsed(Exception):
  """The parser is done."""


@PAGES
def test_commands_parse(page, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # where no output is in the way
  for name, options in commands(page):
    with monkeypatch.context() as patched:
      assert parsed(name, options, patched)["out"].name, options


def test_an_option_that_an_experiment_lacks_is_found(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit):
    parsed("speed", ["--out", "out", "--length", "12o"], monkeypatch)


@PAGES
def test_each_run_had_the_options_of_a_command_on_its_page(page, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  known = []
  for name, options in commands(page):
    with monkeypatch.context() as patched:
      known.append((name, parsed(name, options, patched)))
  for file in filter(is_there, tables.files(page.read_text())):
    results = json.loads((FOLDER / file).read_text())
    assert any(
      name == results["experiment"] and agrees(args, results["config"])
      for name, args in known
    ), file


def is_there(file):
  """Whether a run is: the test of files fails where one is still to come."""
  return (FOLDER / file).is_file()


def agrees(args, config):
  """Whether options, but paths and what depends on the device, are those of a run."""
  paths = {"out", "data_dir", "teacher", "inputs"}
  return all(
    args[name] is None or json.loads(json.dumps(args[name])) == config[name]
    for name in (args.keys() & config.keys()) - paths
  )


@PAGES
def test_tables_are_those_of_the_results(page):
  text = page.read_text()
  # A page without tables says that its runs are still to come.
  assert tables.files(text) or "<!-- to come: " in text or page.name == "index.md"
  assert tables.filled(text) == text


@PAGES
def test_no_figures_stand_in_a_table_that_is_not_made(page):
  rest = tables.BLOCK.sub("", page.read_text())
  assert not re.findall(r"^\|.*\d\.\d.*$", rest, re.MULTILINE)


def test_results_are_shown_small_and_without_paths():
  named = {file for page in tables.PAGES for file in tables.files(page.read_text())}
  there = {str(path.relative_to(FOLDER)): path for path in FOLDER.rglob("*.json")}
  assert named == there.keys()
  for name, path in there.items():
    assert path.stat().st_size < 200_000, name
    assert '"/' not in path.read_text(), name


def test_pictures_are_there_and_shown():
  shown = {picture.resolve() for page in tables.PAGES for picture in figures(page)}
  for picture in shown:
    assert picture.is_file(), picture
  assert {path.resolve() for path in FOLDER.rglob("*.png")} <= shown


ROWS = [
  {"method": "a", "length": 8, "accuracy": 0.126, "temp_bytes": 2**31},
  {"method": "a", "length": 16, "accuracy": 0.3, "errors": [0.5, 0.25]},
  {
    "method": "b, c",
    "length": 8,
    "accuracy": 0.986,
    "accuracy_std": 0.014,
    "kl": -1e-9,
  },
  {"method": "b, c", "length": 8, "accuracy": 0.5, "shift": "half"},
]
OPENING = """<!-- table: one/results.json
column: attention
column: accuracy | length=8 accuracy | .2f
column: MiB | length=8 temp_bytes/1048576 | ,.0f
column: KL | length=8 kl | .3f
column: elsewhere | two/results.json accuracy | .1f
row: **a** | method=a
row: with spaces | method="b, c" shift=
-->
"""
TABLE = """
| attention | accuracy | MiB | KL | elsewhere |
| --- | --- | --- | --- | --- |
| **a** | 0.13 | 2,048 |  | 1.0 |
| with spaces | 0.99 ± 0.01 |  | 0.000 |  |

"""
CLOSING = "<!-- end -->"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Results of two runs."""
  monkeypatch.setattr(tables, "HERE", tmp_path)
  for name, rows in {"one": ROWS, "two": [{"method": "a", "accuracy": 0.96}]}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps({"rows": rows}))
  return tmp_path


def test_a_table_is_filled(folder):
  page = f"before\n{OPENING}{CLOSING}\nafter"
  made = f"before\n{OPENING}{TABLE}{CLOSING}\nafter"
  assert tables.filled(page) == made
  assert tables.filled(made) == made


@pytest.mark.parametrize(("index", "shown"), [(0, "0.50"), (1, "0.25"), (-1, "0.25")])
def test_an_entry_of_a_list_is_shown(index, shown, folder):
  asked = f"column: error | length=16 errors[{index}] | .2f\nrow: a | method=a\n"
  page = f"<!-- table: one/results.json\ncolumn: attention\n{asked}-->\n{CLOSING}"
  assert f"| a | {shown} |" in tables.filled(page)


@pytest.mark.parametrize("place", [m.start() for m in re.finditer(r"\d", TABLE)])
def test_a_wrong_digit_is_found(place, folder):
  wrong = TABLE[:place] + str((int(TABLE[place]) + 1) % 10) + TABLE[place + 1 :]
  assert tables.filled(OPENING + wrong + CLOSING) == OPENING + TABLE + CLOSING


@pytest.mark.parametrize(
  ("old", "new", "said"),
  [
    ("method=a", "method=aa", "nothing"),
    ("temp_bytes/", "bytes/", "nothing"),
    (" shift=", "", "2 rows"),
    ("length=8 accuracy", "accuracy", "2 rows"),
  ],
)
def test_what_a_file_lacks_or_has_twice_is_an_error(old, new, said, folder):
  assert OPENING.count(old) == 1
  with pytest.raises(ValueError, match=said):
    tables.filled(OPENING.replace(old, new) + CLOSING)


def test_a_run_that_is_to_come_is_left_open(folder):
  (folder / "two" / "results.json").unlink()
  assert tables.filled(OPENING + CLOSING) == OPENING + CLOSING


def test_a_run_is_taken_without_the_machine_it_ran_on(folder, monkeypatch):
  run = folder / "run"
  written = run / "results.json"
  results = {
    "config": {"out": "/home/me/out", "seed": 1, "seeds": [1, 2]},
    "environment": {
      "commit": "abc",
      "device_kind": "cpu",
      "cpu_count": 2,
      "python": "3.11",
      "jax": "0.10",
    },
    "rows": [],
    "seconds": {"total": 12.4},
  }
  run.mkdir()
  written.write_text(json.dumps(results))
  os.utime(written, (0, 86400 * 1.5))
  for picture in ("a.png", "b.png"):
    (run / picture).write_bytes(picture.encode())
  page = folder / "page.md"
  page.write_text("![A picture](taken/a.png)")
  monkeypatch.setattr(tables, "PAGES", [page])
  tables.take(run, folder / "taken")
  (picture,) = (folder / "taken").glob("*.png")
  assert picture.read_bytes() == b"a.png"
  taken = json.loads((folder / "taken" / "results.json").read_text())
  assert taken["config"] == {**results["config"], "out": "out"}
  said = tables.filled("<!-- run: taken/results.json -->\n<!-- end -->")
  assert (
    "Run of 1970-01-02 at commit `abc`: cpu, 2 cores, Python 3.11, JAX 0.10, "
    "seed 1, 2, 12 s in all." in said
  )
