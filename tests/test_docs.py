"""The reference is whole: docstrings, the names that pages show, and their code."""

import collections
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from helpers.pages import PAGES, ROOT, examples, run_examples

pytest.importorskip("griffe", reason="needs the extra `docs`")


def hook(name):
  """A module that MkDocs runs."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


docstrings = hook("docstrings")

# The scripts of the page on serving are run by themselves (tests/serving).
ELSEWHERE = ("README", "serving")
WITH_CODE = [page for page in PAGES if examples(page) and page.stem not in ELSEWHERE]


LONG = ("compiler", "matching", "pretrained", "teacher")


@pytest.mark.parametrize(
  "page",
  [
    pytest.param(page, marks=pytest.mark.slow if page.stem in LONG else ())
    for page in WITH_CODE
  ],
  ids=lambda page: page.stem,
)
def test_code_on_pages_runs(page):
  run_examples(page)


def test_docstrings_of_public_names_are_whole():
  assert docstrings.problems() == []


def test_pages_show_every_name_of_the_api_once():
  loaded = docstrings.load()
  on_pages = collections.Counter()
  for page in PAGES:
    for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
      found = loaded[path.removeprefix("asap_jax.")]
      found = found.final_target if found.is_alias else found
      only_text = "asap_jax.peers", "asap_jax.matching"
      whole = found.is_module and path not in only_text
      members = docstrings.shown(found) if whole else [found]
      on_pages.update(each.path for each in members if not each.is_module)
  assert on_pages == collections.Counter(set(docstrings.api_names(loaded)))


GOOD = '''
def scale(x: float, factor: float = 1.0) -> float:
  """x times a factor.

  Args:
    x: what to scale.
    factor: by which.

  Returns:
    The product.

  Raises:
    ValueError: if the factor is zero.
  """
  if factor == 0:
    raise ValueError("factor=0: expected another")
  return x * factor
'''


def problems_of(folder, function):
  package = folder / "asap_jax"
  (package / "peers").mkdir(parents=True)
  (package / "__init__.py").write_text(
    f'"""A package."""\n\n__all__ = ["scale"]\n{function}'
  )
  (package / "peers" / "__init__.py").write_text('"""None."""\n\n__all__ = []\n')
  for path in set(docstrings.API) - {"asap_jax", "asap_jax.peers"}:
    name = path.removeprefix("asap_jax.").replace(".", "/")
    (package / f"{name}.py").write_text('"""Nothing in it."""\n')
  return docstrings.problems(folder)


def test_a_whole_docstring_is_passed(tmp_path):
  assert problems_of(tmp_path, GOOD) == []


@pytest.mark.parametrize(
  ("old", "new", "said"),
  [
    (GOOD[GOOD.index('  """') : GOOD.index("  if")], "", "no docstring"),
    ("    factor: by which.\n", "", r"\['x', 'factor'\]"),
    ("    factor: by which.\n", "    factors: by which.\n", "factors"),
    ("    factor: by which.\n", "    factor by which.\n", "factor"),
    ("  Returns:\n    The product.\n\n", "", "no Returns"),
    ("  Raises:\n    ValueError: if the factor is zero.\n", "", "lacks ValueError"),
    ("    ValueError: if the", "    if the", "exception"),
  ],
)
def test_what_is_missing_or_malformed_is_found(old, new, said, tmp_path):
  assert GOOD.count(old) == 1
  (problem, *_) = problems_of(tmp_path, GOOD.replace(old, new))
  assert re.search(said, problem)


@pytest.mark.parametrize(
  "marked",
  [
    r'<span class="arithmatex">\(a_i &lt; b\)</span>',
    r'<div class="arithmatex">\[a_i &lt; b\]</div>',
  ],
)
def test_formulas_are_typeset(marked):
  pytest.importorskip("latex2mathml", reason="needs the extra `docs`")
  found = hook("formulas").on_page_content(f"<p>before {marked} after</p>")
  assert re.fullmatch(r"<p>before <math .*</math> after</p>", found)
  assert "<msub><mi>a</mi><mi>i</mi></msub><mo>&lt;</mo><mi>b</mi>" in found.replace(
    "&#x0003C;", "&lt;"
  )
  assert ('display="block"' in found) == marked.startswith("<div")


def build(folder):
  """Builds the site of a checkout as strictly as can be."""
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
  return subprocess.run(
    [*command, str(folder / "site")], cwd=folder, capture_output=True, text=True
  )


@pytest.fixture
def checkout(tmp_path):
  """What the site is built from."""
  pytest.importorskip("mkdocs", reason="needs the extra `docs`")
  for name in ("asap_jax", "docs"):
    shutil.copytree(ROOT / name, tmp_path / name)
  for name in ("README.md", "mkdocs.yml"):
    shutil.copy(ROOT / name, tmp_path)
  return tmp_path


@pytest.mark.slow
def test_the_site_builds_strictly_and_not_with_a_malformed_docstring(checkout):
  built = build(checkout)
  assert built.returncode == 0, built.stderr
  page = (checkout / "site" / "api" / "attention" / "index.html").read_text()
  assert 'id="asap_jax.sinkhorn_attention"' in page
  page = (checkout / "site" / "api" / "c_transform" / "index.html").read_text()
  assert "<math" in page
  assert "arithmatex" not in page
  source = checkout / "asap_jax" / "c_transform" / "entropic.py"
  text, count = re.subn(
    r"(\n  Args:\n    )(\w+):", r"\1not_\2:", source.read_text(), count=1
  )
  assert count == 1
  source.write_text(text)
  broken = build(checkout)
  assert broken.returncode != 0
  assert "not_" in broken.stderr
