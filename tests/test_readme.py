"""Code that the README shows runs."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_example_runs_and_prints_its_report(capsys):
  (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  names: dict = {}
  exec(compile(example, "README.md", "exec"), names)
  assert names["outputs"].shape == (16, 64, 32)
  assert "column error" in capsys.readouterr().out


def test_figures_are_there():
  figures = re.findall(r"!\[.*?\]\((.*?)\)", README.read_text())
  assert figures
  for figure in figures:
    assert (README.parent / figure).is_file(), figure
