"""What a function is lowered to, for platforms that are not at hand."""

import collections
import os
import re
import subprocess
import sys
import textwrap

import jax

ACCELERATORS = ("cuda", "tpu")
# What looks numbers up by places that are data, or repeats until data say so.
LOOK_UPS = ("gather", "scatter", "dynamic_slice", "dynamic_update_slice")
LOOPS = ("while",)


def operations(function, *arguments, platforms=ACCELERATORS):
  """How many StableHLO operations of each name there are, for each platform.

  One platform after another: a module for several holds the code of all of them.
  """
  return {platform: _count(function, arguments, platform) for platform in platforms}


def _count(function, arguments, platform):
  text = exported(function, *arguments, platform=platform)
  names = re.findall(r"(?:stablehlo|chlo)\.(\w+)", text)
  return collections.Counter(names)


def exported(function, *arguments, platform):
  """The StableHLO of a function for one platform."""
  function = jax.export.export(jax.jit(function), platforms=[platform])
  return function(*arguments).mlir_module()


def loops_on_data(text):
  """How many loops of StableHLO have a condition that compares no counter."""
  conditions = re.findall(r"\bcond \{(.*?)\} do \{", text, re.DOTALL)
  assert len(conditions) == text.count("stablehlo.while")
  return sum("stablehlo.compare" not in each for each in conditions)


def products(text):
  """Of each product in StableHLO: its precisions, sizes of both factors and its own."""
  lines = [line for line in text.splitlines() if "= stablehlo.dot_general" in line]
  found = []
  for line in lines:
    named = re.search(r"precision = \[(\w+), (\w+)\]", line)
    precisions = set(named.groups()) if named else {"DEFAULT"}
    sizes = [re.findall(r"(\d+)x", each) for each in re.findall(r"tensor<(\S+)>", line)]
    found.append((precisions, *(tuple(map(int, each)) for each in sizes)))
  return found


def found(counted, names):
  """Those operations whose names hold one of these words."""
  return {
    name: count
    for name, count in counted.items()
    if any(word in name for word in names)
  }


COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"
)  # fmt: skip


def collectives(compiled):
  """Kinds of communication in a compiled function."""
  text = compiled.as_text()
  return [name for name in COLLECTIVES if name in text]


def run_on_host_devices(count, script):
  """What a script prints that sees so many devices, all of them this CPU."""
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
  path = os.pathsep.join(entry for entry in sys.path if entry)
  run = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr
  return run.stdout.split()
