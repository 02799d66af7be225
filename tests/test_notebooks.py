"""Notebooks run, are what their scripts say, and hold clean outputs."""

import re
import subprocess
import sys

import pytest
from helpers.pages import ROOT

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")

FOLDER = ROOT / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
# Where somebody's files lie, and what nobody wants to read.
UNCLEAN = re.compile(
  r"(/home/|/root/|/tmp/|/Users/|/work/|[A-Z]:\\|site-packages|Warn)"
)

of_each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def sources(path):
  return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def check_outputs(notebook):
  """Every cell was run, in order, and put out nothing that should not be read."""
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell.outputs]
  assert {output.output_type for output in outputs} <= {
    "display_data",
    "execute_result",
    "stream",
  }
  assert not [output for output in outputs if output.get("name") == "stderr"]
  for output in outputs:
    texts = (text for kind, text in output.get("data", {}).items() if "text" in kind)
    for text in (output.get("text", ""), *texts):
      assert not UNCLEAN.search(text), text
  return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_is_a_script_for_every_notebook():
  assert [path.stem for path in SCRIPTS] == sorted(
    path.stem for path in FOLDER.glob("*.ipynb")
  )
  assert len(SCRIPTS) >= 4


@of_each
def test_notebook_and_script_are_one_document(script):
  assert sources(script) == sources(script.with_suffix(".ipynb"))


@of_each
def test_committed_outputs_are_complete_and_clean(script):
  notebook = jupytext.read(script.with_suffix(".ipynb"))
  assert check_outputs(notebook) >= 2
  assert set(notebook.metadata) <= {"kernelspec", "language_info"}
  assert script.with_suffix(".ipynb").stat().st_size < 1_500_000


@pytest.mark.slow
@of_each
def test_notebook_runs(script, tmp_path):
  command = [sys.executable, FOLDER / "execute.py", script, "--out", tmp_path]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr
  committed = jupytext.read(script.with_suffix(".ipynb"))
  images = check_outputs(jupytext.read(tmp_path / f"{script.stem}.ipynb"))
  assert images == check_outputs(committed)
