"""Runs the scripts of notebooks and writes the notebooks with their outputs.

python notebooks/execute.py [notebooks/1_transport_to_dual.py ...]
"""

import os
import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(script: pathlib.Path, timeout: int = 300) -> NotebookNode:
  """The notebook of a script, run in the package of this checkout.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell raises.
  """
  notebook = jupytext.read(script)
  notebook.metadata = {"kernelspec": KERNEL}
  client = NotebookClient(notebook, timeout=timeout, record_timing=False)
  found = os.environ.get("PYTHONPATH")
  paths = [str(FOLDER.parent.absolute()), *([found] if found else [])]
  client.execute(cwd=str(FOLDER), env=os.environ | {"PYTHONPATH": ":".join(paths)})
  # The rest differs from machine to machine.
  notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
  for index, cell in enumerate(notebook.cells):
    cell.id = f"cell-{index}"
    cell.metadata = {}
  return notebook


def main() -> None:
  """Executes the scripts that are named, or all."""
  for script in map(pathlib.Path, sys.argv[1:] or SCRIPTS):
    start = time.perf_counter()
    nbformat.write(execute(script), script.with_suffix(".ipynb"))
    print(f"{script.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main()
