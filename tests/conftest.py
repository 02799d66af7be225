"""Checks every annotation of the package at run time, in all tests."""

import os
import pathlib
import warnings

import hypothesis
import jax
import jaxtyping
import pytest
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
from jaxtyping import install_import_hook

# Most of a test's time is XLA compiling what runs once: let it optimise less.
_FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
]
if jax.__version_info__ < (0, 11):
  # The older generator of loops takes a quarter less time. XLA ends at flags that it
  # does not know; this one is known up to here.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

# Programs that tests compile alike are kept, where a folder is named. Each worker has
# one of its own, for JAX does not write files whole or not at all, and processes that
# tests start have none.
_programs = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
if _programs and "PYTEST_XDIST_WORKER" in os.environ:
  _programs = f"{_programs}/{os.environ['PYTEST_XDIST_WORKER']}"
elif _programs:  # for the workers that this process starts
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
if _programs:
  jax.config.update("jax_compilation_cache_dir", _programs)

with warnings.catch_warnings():
  # OTT-JAX imports JAXopt, which announces its own end.
  warnings.simplefilter("ignore", DeprecationWarning)
  import ott  # noqa: F401

with (
  install_import_hook("asap_jax", "beartype.beartype"),
  warnings.catch_warnings(),
):
  # Flax's types are spelt in the old way.
  warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
  import asap_jax  # noqa: F401

# The first example of a shape compiles, so that a deadline would be meaningless.
hypothesis.settings.register_profile(
  "asap", deadline=None, derandomize=True, max_examples=20
)
hypothesis.settings.load_profile("asap")


def pytest_collection_modifyitems(items):
  """Marks as slow the cases of a test whose other cases are quick and run always."""
  here = pathlib.Path(__file__).parent
  cases = set((here / "slow_cases.txt").read_text().splitlines())
  for item in items:
    if item.nodeid.removeprefix(f"{here.name}/") in cases:
      item.add_marker(pytest.mark.slow)


@pytest.fixture
def unchecked():
  """Annotations off, to see what a caller without a type checker sees."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="module")
def release_executables():
  """Drops what a module has compiled: a process may map only so many pieces of code."""
  yield
  jax.clear_caches()
