"""Runs the scripts of notebooks, and writes the notebooks with what they put out.

python notebooks/execute.py [notebooks/1_transport_to_dual.py ...] [--out DIR]
"""

import argparse
import os
import pathlib
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = pathlib.Path(__file__).parent.absolute()
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(script: pathlib.Path, timeout: int = 1800) -> NotebookNode:
  """The notebook of a script, run with the package of this checkout.

  Args:
    script: cells in jupytext's percent form.
    timeout: of a cell, seconds.

  Raises:
    nbclient.exceptions.CellExecutionError: if a cell raises.
  """
  notebook = jupytext.read(script)
  notebook.metadata = {"kernelspec": KERNEL}
  client = NotebookClient(notebook, timeout=timeout, record_timing=False)
  paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
  client.execute(cwd=str(FOLDER), env=environment)
  # The rest differs from machine to machine.
  notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
  for index, cell in enumerate(notebook.cells):
    cell.id, cell.metadata = f"cell-{index}", {}
  return notebook


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("scripts", nargs="*", type=pathlib.Path, help="all by default")
  parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
  args = parser.parse_args()
  for script in args.scripts or sorted(FOLDER.glob("[0-9]*.py")):
    start = time.perf_counter()
    nbformat.write(execute(script), args.out / f"{script.stem}.ipynb")
    print(f"{script.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main()
