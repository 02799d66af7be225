"""The examples in docstrings run and print what they show."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax

pytest.importorskip("matplotlib", reason="needs the extra `experiments`")

# Known to every example, with the names of its module; all else it imports itself.
NAMES = {"asap_jax": asap_jax, "jax": jax, "jnp": jnp, "nnx": nnx, "np": np}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def described(module):
  """A module, what it defines, and the methods of its classes, by name."""
  yield module.__name__, module
  for name, found in vars(module).items():
    # Also what is jitted or checked at run time, which doctest's own finder passes by.
    if getattr(found, "__module__", None) == module.__name__:
      yield name, found
      if inspect.isclass(found):
        for part, member in vars(found).items():
          yield f"{name}.{part}", member


def examples(module):
  """The tests in a module's docstrings."""
  finder = doctest.DocTestFinder(recurse=False)
  for name, found in described(module):
    if ">>>" in (inspect.getdoc(found) or ""):
      yield from finder.find(found, name, module, globs={**vars(module), **NAMES})


MODULES = [asap_jax]
MODULES += [
  importlib.import_module(found.name)
  for found in pkgutil.walk_packages(asap_jax.__path__, "asap_jax.")
]
WITH_EXAMPLES = [module for module in MODULES if any(examples(module))]


# Their examples fit something, sort eagerly, or import OTT-JAX.
LONG = ("compiler.api", "compiler.distillation", "kantorovich", "teacher.initializer")


@pytest.mark.parametrize(
  "module",
  [
    pytest.param(each, marks=pytest.mark.slow if each.__name__.endswith(LONG) else ())
    for each in WITH_EXAMPLES
  ],
  ids=lambda module: module.__name__,
)
def test_examples_of_a_module_run(module):
  runner = doctest.DocTestRunner(optionflags=FLAGS)
  said = []
  for test in examples(module):
    runner.run(test, out=said.append)
  assert runner.tries > 0
  assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("name", asap_jax.__all__)
def test_every_name_of_the_package_has_an_example(name):
  found = getattr(asap_jax, name)
  (module,) = (each for each in MODULES if each.__name__ == found.__module__)
  # Found there, and so run by the test above.
  assert name in [test.name for test in examples(module)]
