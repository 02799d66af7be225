"""Versions, devices and implementations, for a report of a fault.

`python -m asap_jax.info` prints them.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp

import asap_jax
from asap_jax.attention.implementations.choice import Implementation, choose

PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "ott-jax", "chex", "orbax-checkpoint"),
  *("jaxtyping", "numpy", "scipy"),
)
DTYPES = ("float32", "bfloat16", "float16")
# Shape of the attention that is asked for: every kernel takes it.
_LENGTH, _DIM = 128, 64


def info() -> dict[str, Any]:
  """Versions, settings, devices and implementations, as JSON takes them.

  Looks at every local device, so that JAX's back ends are started. Host code.

  >>> from asap_jax.info import info
  >>> sorted(info())
  ['devices', 'implementations', 'packages', 'platform', 'python', 'settings']

  Returns:
    `python`, `platform`; `packages`, a version or `None` for each; `settings`, those
    of JAX and XLA that change results or devices; `devices`, their kinds by name;
    `implementations`, for each device, dtype and name `None` where it runs, else why it
    does not (`asap_jax.attention.implementations`). Where JAX starts no device,
    `devices` and `implementations` are empty and `error` says why.
  """
  versions = {name: _version(name) for name in [*PACKAGES, *_plugins()]}
  found: dict[str, Any] = {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "packages": {"asap_jax": asap_jax.__version__, **versions},
    "settings": _settings(),
    "devices": {},
    "implementations": {},
  }
  try:
    devices = jax.local_devices()
  # Where no named platform starts, JAX fails by an assertion without words.
  except (RuntimeError, AssertionError) as error:
    said = str(error) or f"no device of {os.environ.get('JAX_PLATFORMS')!r} starts"
    return found | {"error": said}
  return found | {
    "devices": {str(device): device.device_kind for device in devices},
    "implementations": {str(device): _implementations(device) for device in devices},
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _plugins() -> list[str]:
  """JAX's packages for other devices than CPUs."""
  names = {str(each.name) for each in importlib.metadata.distributions()}
  return sorted(name for name in names if name.startswith(("jax-", "jax_", "libtpu")))


def _settings() -> dict[str, str]:
  named = ("jax_enable_x64", "jax_default_matmul_precision", "jax_debug_nans")
  outside = sorted(name for name in os.environ if name.startswith(("JAX_", "XLA_")))
  found = {name: str(getattr(jax.config, name)) for name in named}
  return found | {name: os.environ[name] for name in outside}


def _implementations(device: jax.Device) -> dict[str, dict[str, str | None]]:
  """Why an implementation does not run there, or `None`, by dtype and name."""
  return {
    dtype: {name: _reason(name, device, dtype) for name in get_args(Implementation)}
    for dtype in DTYPES
  }


def _reason(name: Implementation, device: jax.Device, dtype: str) -> str | None:
  tokens = jax.device_put(jnp.zeros((1, 1, _LENGTH, _DIM), dtype), device)
  try:
    choose(name, tokens, tokens, tokens)
  except ValueError as error:
    return str(error)
  return None


def _lines(found: Mapping[str, Any], none: str, depth: int = 0) -> Iterator[str]:
  for name, value in found.items():
    if isinstance(value, Mapping):
      yield f"{'  ' * depth}{name}:"
      of_value = "not installed" if name == "packages" else none
      yield from _lines(value, of_value, depth + 1)
    else:
      yield f"{'  ' * depth}{name}: {none if value is None else value}"


def main() -> None:
  """Prints `info()`."""
  print("\n".join(_lines(info(), "available")))


if __name__ == "__main__":
  main()
