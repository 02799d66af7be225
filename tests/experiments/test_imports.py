"""No experiment imports another."""

import ast

import pytest
from helpers.pages import ROOT

HOUSE = ROOT / "experiments"
SHARED = {"common", "datasets", "encoders"}
MODULES = sorted(path.relative_to(HOUSE) for path in HOUSE.rglob("*.py"))


def owner_of(parts):
  """The folder or module of `experiments` that a path of names leads into."""
  return parts[0].removesuffix(".py") if parts else "__init__"


def imported(text):
  """Owners that a module's imports of `experiments` lead into."""
  found = set()
  for node in ast.walk(ast.parse(text)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, "relative imports hide where they lead"
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    found |= {
      owner_of(name.split(".")[1:])
      for name in names
      if name.split(".")[0] == "experiments"
    }
  return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_experiments_import_only_themselves_and_what_is_shared(path):
  owner = owner_of(path.parts)
  # What is shared knows no experiment; `common` does not know the data sets either.
  own = {"common": {"common"}, "datasets": {"common", "datasets"}, "encoders": SHARED}
  allowed = own.get(owner, {owner} | SHARED)
  assert imported((HOUSE / path).read_text()) <= allowed


@pytest.mark.parametrize(
  ("text", "owners"),
  [
    ("from experiments.speed import display", {"speed"}),
    ("from experiments import report", {"report"}),
    ("def f():\n  import experiments.peers.claims as c", {"peers"}),
    ("from asap_jax import peers\nimport experimental.speed", set()),
  ],
)
def test_imports_are_found(text, owners):
  assert imported(text) == owners


def test_all_experiments_are_looked_at():
  owners = {owner_of(path.parts) for path in MODULES}
  assert {"downstream", "speed", "quickstart", "report", *SHARED} <= owners
