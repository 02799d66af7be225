"""The variables of a model by name, and their arrays in an Orbax checkpoint."""

import contextlib
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from asap_jax.attention.amortized import DualLoss

# What a call leaves behind is no part of a model.
KEPT = nnx.Not(nnx.Any(nnx.Intermediate, DualLoss))
_PLAIN = bool, int, float, str
Path = tuple[Any, ...]


def name_of(path: Iterable[Any]) -> str:
  """A path in one word; dots and slashes inside of its parts are escaped.

  >>> name_of(["layers", 0, "a.b"]), name_of(["layers", 0, "a", "b"])
  ('layers.0.a%2Eb', 'layers.0.a.b')
  """
  return ".".join(quote(str(part), safe="").replace(".", "%2E") for part in path)


def leaves_of(state: nnx.State, written: int = 3) -> dict[str, Any]:
  """Everything in the variables of a state, by name, real or abstract.

  A variable may hold a pytree: then each of its leaves has a name.

  Args:
    state: of a model.
    written: format of the names; in format 2 nothing was escaped.

  Raises:
    ValueError: if two have one name.
  """
  found: dict[str, Any] = {}
  for path, value in _values(state):
    for inner, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
      whole = (*path, *map(_key, inner))
      name = ".".join(map(str, whole)) if written == 2 else name_of(whole)
      if name in found:
        raise ValueError(
          f"model has two variables of the name {name}: expected keys that differ when "
          "they are written, unlike 1 and '1'"
        )
      found[name] = leaf
  return found


def _values(state: nnx.State) -> list[tuple[Path, Any]]:
  return [
    (path, each.get_value() if isinstance(each, nnx.Variable) else each)
    for path, each in nnx.to_flat_state(state)
  ]


def _key(entry: Any) -> Any:
  for name in ("key", "idx", "name"):
    if hasattr(entry, name):
      return getattr(entry, name)
  return entry


def with_leaves(
  state: nnx.State, leaves: Mapping[str, Any], written: int = 3
) -> nnx.State:
  """`state` with these leaves in the place of its own, by name."""
  names = iter(leaves_of(state, written))
  flat = []
  for path, each in nnx.to_flat_state(state):
    is_variable = isinstance(each, nnx.Variable)
    value = each.get_value() if is_variable else each
    own, treedef = jax.tree.flatten(value)
    value = jax.tree.unflatten(treedef, [leaves[next(names)] for _ in own])
    flat.append((path, each.replace(value) if is_variable else value))
  return nnx.from_flat_state(flat)


def is_key(leaf: Any) -> bool:
  """Whether a leaf is an array of PRNG keys."""
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_plain(leaf: Any) -> bool:
  """Whether a leaf is a number or a text of Python, which JSON takes."""
  return isinstance(leaf, _PLAIN) and not isinstance(leaf, np.generic)


def describe(leaf: Any) -> list[Any]:
  """Shape and dtype of a leaf, of a key as raw data; of a plain one its type."""
  if is_plain(leaf):
    return [type(leaf).__name__]
  if is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return [list(leaf.shape), np.dtype(leaf.dtype).name]


class Split:
  """Leaves of a model, parted by how they are written.

  Attributes:
    arrays: for Orbax, PRNG keys as raw data.
    described: shape and dtype of everything, arrays without elements included.
    keys: implementations of the keys.
    host: what NumPy holds, and is to hold again: `"array"` or `"number"`.
    values: numbers and texts of Python.

  Raises:
    ValueError: if a leaf is abstract, or nothing that can be saved.
  """

  def __init__(self, leaves: Mapping[str, Any]):
    self.arrays: dict[str, Any] = {}
    self.described: dict[str, list[Any]] = {}
    self.keys: dict[str, str] = {}
    self.host: dict[str, str] = {}
    self.values: dict[str, Any] = {}
    for name, leaf in leaves.items():
      self._take(name, leaf)

  def _take(self, name: str, leaf: Any) -> None:
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
      raise ValueError(
        f"model holds no array at {name}, but {leaf}: expected a model with values, "
        "outside of jit and nnx.eval_shape"
      )
    if is_plain(leaf):
      self.values[name] = leaf
      return
    if is_key(leaf):
      self.keys[name] = str(jax.random.key_impl(leaf))
      leaf = jax.random.key_data(leaf)
    elif isinstance(leaf, np.ndarray | np.generic):
      self.host[name] = "array" if isinstance(leaf, np.ndarray) else "number"
      leaf = np.asarray(leaf)
      if leaf.dtype.kind not in "biufcV" or leaf.dtype.names is not None:
        raise ValueError(f"model holds an array of {leaf.dtype} at {name}: {_EXPECTED}")
    elif not isinstance(leaf, jax.Array):
      raise ValueError(f"model holds a {type(leaf).__name__} at {name}: {_EXPECTED}")
    self.described[name] = describe(leaf)
    # Orbax refuses arrays without elements.
    if leaf.size > 0:
      self.arrays[name] = leaf


_EXPECTED = "expected arrays of numbers, numbers or texts in its variables"


def write(folder: pathlib.Path, arrays: dict[str, Any]) -> None:
  """Writes arrays to a new folder.

  Raises:
    OSError: if that cannot be done.
  """
  try:
    with _quietly(), ocp.StandardCheckpointer() as checkpointer:
      # Orbax refuses to save nothing.
      checkpointer.save(folder, arrays or {"": np.zeros(1)})
      checkpointer.wait_until_finished()
  except OSError:
    raise
  except Exception as error:
    raise OSError(f"path={folder}: cannot be written: {_reason(error)}") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
  """Keeps Orbax from logging each thread's part of an error that is raised anyway."""

  def is_other(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname

  logger = logging.getLogger("absl")
  logger.addFilter(is_other)
  try:
    yield
  finally:
    logger.removeFilter(is_other)


def _reason(error: BaseException) -> str:
  """What an error of Orbax comes to, which is long."""
  text = str(error)
  for known in ("No space left on device", "Disk quota exceeded", "File too large"):
    if known in text:
      return known
  return text.partition("\n")[0][:200]


def read(
  folder: pathlib.Path,
  described: Mapping[str, list[Any]],
  blanks: Mapping[str, Any],
  keys: Mapping[str, str],
  host: Mapping[str, str],
) -> dict[str, Any]:
  """Reads arrays, each to where the model that is loaded has its own.

  Args:
    folder: that was written.
    described: shape and dtype by saved name.
    blanks: leaf of the model by saved name.
    keys: implementation of PRNG keys.
    host: what is to be NumPy's.
  """
  wanted: dict[str, Any] = {}
  found: dict[str, Any] = {}
  for name, (shape, dtype) in described.items():
    sharding = None if name in host else _sharding(blanks[name])
    if 0 in shape:
      found[name] = np.zeros(shape, dtype)
    elif sharding is None:
      # Read as NumPy's, an array is bound to no device that it was saved on.
      wanted[name] = np.broadcast_to(np.zeros((), dtype), shape)
    else:
      wanted[name] = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
  if wanted:
    with ocp.StandardCheckpointer() as checkpointer:
      found |= checkpointer.restore(folder, wanted)
  for name, array in found.items():
    if name in host:
      found[name] = array if host[name] == "array" else array[()]
    else:
      array = jnp.asarray(array)
      is_raw = name not in keys
      found[name] = (
        array if is_raw else jax.random.wrap_key_data(array, impl=keys[name])
      )
  return found


def _sharding(blank: Any) -> jax.sharding.Sharding | None:
  """Where a leaf of a model lies; `None` where it is free to join others."""
  sharding = getattr(blank, "sharding", None)
  if not isinstance(sharding, jax.sharding.Sharding):
    return None
  try:
    devices = sharding.device_set
  except (ValueError, RuntimeError, NotImplementedError):  # of a mesh without devices
    return None
  default = jnp.zeros(()).devices()
  return None if devices == default else sharding
