"""What is missing or malformed in the docstrings of public names.

Run by MkDocs before it builds, where every finding is a warning (`--strict` fails on
them), and by the tests. Nothing of the package is imported: griffe reads the source.
"""

import ast
import logging
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "asap_jax"
# What these export, or define where they have no `__all__`, is the API: its docstrings
# have all sections.
_ROOMS = ("potentials", "dual_map", "c_transform", "teacher", "attention", "compiler")
_BESIDE = ("matching", "peers", "peers.layers", "info", "metrics", "plotting")
API = (PACKAGE, *(f"{PACKAGE}.{name}" for name in (*_ROOMS, *_BESIDE)))
# Of modules that are otherwise no part of it.
NAMES = (
  "attention.implementations.iterated.iterated_attention",
  "attention.implementations.xla.scaled_attention",
  "attention.implementations.chunked.chunked_attention",
  "attention.implementations.cudnn.cudnn_attention",
  "attention.implementations.pallas.pallas_attention",
  "compiler.fitting.objective.dual_objective",
  "diagnosis.LayerDiagnosis",
  "diagnosis.PathDiagnosis",
)
_LOG = logging.getLogger("mkdocs.docstrings")


def on_pre_build(config: Any) -> None:
  """Called by MkDocs: warns of what it finds."""
  root = pathlib.Path(config.config_file_path).parent
  for problem in problems(root):
    _LOG.warning(problem)


def problems(root: pathlib.Path = ROOT, package: str = PACKAGE) -> list[str]:
  """A sentence for everything wrong with a public name's docstring.

  Every public module, class, function and method has one, and every section in it
  parses. Parameters are documented all or none, under their own names. A function of
  the API documents all of them, what it returns and what it raises itself.
  """
  captured = _Captured()
  griffe_log = logging.getLogger("griffe")
  griffe_log.addHandler(captured)
  try:
    loaded = load(root, package)
    api = set(api_names(loaded))
    found = [
      problem for each in _public(loaded) for problem in _of(each, each.path in api)
    ]
  finally:
    griffe_log.removeHandler(captured)
  return [*captured.messages, *found]


def load(root: pathlib.Path = ROOT, package: str = PACKAGE) -> griffe.Module:
  """The package as griffe reads it."""
  return griffe.load(
    package, search_paths=[root], docstring_parser="google", try_relative_path=False
  )


def api_names(loaded: griffe.Module) -> Iterator[str]:
  """Paths, where they are defined, of the names that the reference shows."""
  for path in API:
    yield from (each.path for each in shown(_at(loaded, path)))
  yield from (f"{loaded.path}.{name}" for name in NAMES)


def shown(module: griffe.Module) -> list[griffe.Object]:
  """What a module exports, or defines where it has no `__all__`, but its constants."""
  if module.exports is None:
    return [each for each in module.members.values() if is_public(each)]
  targets = []
  for name in map(str, module.exports):
    found = module.members[name]
    found = found.final_target if found.is_alias else found
    # A function may hide the module of its own name.
    targets.append(found.members.get(name, found) if found.is_module else found)
  return [each for each in targets if is_public(each)]


def is_public(found: griffe.Object | griffe.Alias) -> bool:
  """Whether a member is a module, class, function or property for others to use."""
  if found.is_alias or found.name.startswith("_"):
    return False
  return not found.is_attribute or "property" in found.labels


def _at(loaded: griffe.Module, path: str) -> griffe.Module:
  below = path.removeprefix(loaded.path).removeprefix(".")
  return loaded[below] if below else loaded


def _public(found: griffe.Object) -> Iterator[griffe.Object]:
  """An object and all public ones defined in it."""
  yield found
  for member in found.members.values():
    if is_public(member):
      yield from _public(member)


def _of(found: griffe.Object, in_api: bool) -> Iterator[str]:
  where = f"{found.relative_filepath}:{found.lineno or 1}: {found.path}"
  if not found.has_docstring:
    # What is overridden may be described where it comes from.
    if not (found.is_function and found.name.startswith("tree_")):
      yield f"{where} has no docstring"
    return
  sections = {each.kind.value: each.value for each in found.docstring.parsed}

  def named(kind: str) -> list[str]:
    return [each.name for each in sections.get(kind, ())]

  if found.is_function or (found.is_class and "parameters" in sections):
    expected = list(_parameters(found))
    if (in_api or "parameters" in sections) and named("parameters") != expected:
      yield f"{where}: Args are {named('parameters')}, the signature has {expected}"
  elif found.is_class and (in_api or "attributes" in sections):
    missing = [name for name in _fields(found) if name not in named("attributes")]
    if missing:
      yield f"{where}: Attributes lack {', '.join(missing)}"
  if in_api and (found.is_function or found.is_class):
    said = {str(each.annotation) for each in sections.get("raises", ())}
    if missing := sorted(_raised(found) - said):
      yield f"{where}: Raises lacks {', '.join(missing)}"
  if in_api and found.is_function:
    if "returns" not in sections and str(found.returns) != "None":
      yield f"{where} has no Returns"


def _parameters(found: griffe.Function | griffe.Class) -> Iterator[str]:
  stars = {"variadic positional": "*", "variadic keyword": "**"}
  for each in found.parameters:
    if each.name not in ("self", "cls"):
      yield stars.get(each.kind.value, "") + each.name


def _fields(found: griffe.Class) -> Iterator[str]:
  """Fields of a NamedTuple or a dataclass."""
  bases = {str(base) for base in found.bases}
  if "NamedTuple" in bases or "dataclass" in found.labels:
    for name, member in found.members.items():
      if member.is_attribute and "property" not in member.labels and name[0] != "_":
        yield name


def _raised(found: griffe.Function | griffe.Class) -> set[str]:
  """Names of the exceptions that a function, or a class's `__init__`, raises itself."""
  if found.is_class:
    if "__init__" not in found.members or "dataclass" in found.labels:
      return set()
    found = found.members["__init__"]
  source = textwrap.dedent("\n".join(found.lines))
  (function,) = ast.parse(source).body
  return set(_exceptions(function.body))


def _exceptions(nodes: list[ast.stmt]) -> Iterator[str]:
  for node in nodes:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      continue
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
      yield ast.unparse(node.exc.func)
    below = [child for child in ast.iter_child_nodes(node) if child is not node]
    yield from _exceptions([child for child in below if isinstance(child, _HOLDERS)])


# What statements stand in.
_HOLDERS = ast.stmt | ast.ExceptHandler | ast.match_case


class _Captured(logging.Handler):
  """Keeps warnings instead of printing them."""

  def __init__(self) -> None:
    super().__init__(logging.WARNING)
    self.messages: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    """Keeps one."""
    self.messages.append(record.getMessage())
