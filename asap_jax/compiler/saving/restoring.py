"""A model from a manifest, arrays and a blank of its architecture."""

import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import jax
import jax.numpy as jnp
from flax import nnx

from asap_jax.compiler.report import device_kind
from asap_jax.compiler.saving import arrays, folders, manifest, options
from asap_jax.compiler.saving.names import Names
from asap_jax.compiler.saving.sites import blank_at, other_teacher
from asap_jax.compiler.saving.watches import watches_of
from asap_jax.compiler.sites import Site, find_sinkhorn, replace_sites
from asap_jax.compiler.watching import watched_as


def restored(
  source: pathlib.Path,
  saved: dict[str, Any],
  model: nnx.Module,
  changed: Mapping[str, str] | None,
) -> nnx.Module:
  """The saved model.

  Args:
    source: folder that it is in.
    saved: its manifest.
    model: see `asap_jax.load`.
    changed: names there.

  Raises:
    ValueError: as `asap_jax.load`.
  """
  manifest.check_files(source, saved)
  _check_width(source, saved)
  names, written = Names(changed), saved["format"]
  compiled = _with_blanks(model, saved, names, source)
  _fill_raw(compiled)
  # Sown values are no part of a saved model.
  nnx.pop(compiled, nnx.Not(arrays.KEPT))
  graph, state = nnx.split(compiled)
  blanks = arrays.leaves_of(state, written)
  now = {name: _renamed(name, names, written) for name in _saved_names(saved)}
  by_saved = _matched(blanks, saved, now)
  names.check_used()
  leaves = arrays.read(
    manifest.home(source, saved) / folders.ARRAYS,
    saved["arrays"],
    by_saved,
    saved["keys"],
    saved.get("host", {}),
  )
  leaves |= saved.get("values", {})
  by_name = {now[name]: leaf for name, leaf in leaves.items()}
  loaded = nnx.merge(graph, arrays.with_leaves(state, by_name, written))
  _set_modes(loaded, saved, names)
  return watched_as(loaded, watches_of(loaded, saved, names))


def _check_width(source: pathlib.Path, saved: dict[str, Any]) -> None:
  """Raises ValueError where arrays have 64 bits and JAX is to have none."""
  wide = [
    name
    for name, described in saved["arrays"].items()
    if name not in saved.get("host", {})
    and jax.dtypes.canonicalize_dtype(described[1]) != described[1]
  ]
  if wide:
    more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
    raise ValueError(
      f"path={source} has arrays of 64 bits ({', '.join(wide[:3])}{more}): expected "
      "jax_enable_x64, as where it was compiled; or compile again without"
    )


def _fill_raw(model: nnx.Module) -> None:
  """Gives values to arrays that are no variables, which an abstract model lacks.

  There Flax leaves what `nnx.eval_shape` traced them by.
  """
  for _, module in nnx.iter_modules(model):
    for name, value in list(vars(module).items()):
      if isinstance(value, jax.ShapeDtypeStruct | jax.core.Tracer):
        setattr(module, name, nnx.data(jnp.zeros(value.shape, value.dtype)))


def _with_blanks(
  model: nnx.Module, saved: dict[str, Any], names: Names, source: pathlib.Path
) -> nnx.Module:
  """A copy of the model with blanks of what stood at the saved sites."""
  found = {_place((*site.path, site.attribute)): site for site in find_sinkhorn(model)}
  before = {
    _place(names.now((*site["path"], site["attribute"]))): site
    for site in saved["sites"]
  }
  if found.keys() != before.keys():
    lacking, more = before.keys() - found.keys(), found.keys() - before.keys()
    raise ValueError(
      "model has Sinkhorn attention elsewhere than the saved one: "
      f"it has none at {', '.join(sorted(lacking)) or '-'}, and more at "
      f"{', '.join(sorted(more)) or '-'}; where attributes were renamed, pass names="
    )
  for where, site in found.items():
    differing = options.differences(
      site.options, before[where]["options"], saved["format"]
    )
    if differing:
      raise ValueError(
        f"model binds other options to the attention {site.name}: "
        f"{'; '.join(differing)}"
      )
  _warn(source, saved, found, before)
  sites = list(found.values())
  functions = [blank_at(before[where], site.options) for where, site in found.items()]
  return replace_sites(model, sites, functions)


def _place(path: Sequence[Any]) -> str:
  return ".".join(map(str, path))


def _warn(
  source: pathlib.Path,
  saved: dict[str, Any],
  found: Mapping[str, Site],
  before: Mapping[str, dict[str, Any]],
) -> None:
  """Operators are chosen for a device and for a teacher; older models tell of none."""
  here = device_kind()
  devices = {site.get("record", {}).get("device") for site in saved["sites"]} - {None}
  for device in sorted(devices or {saved.get("device") or here}):
    if device != here:
      warnings.warn(
        f"path={source} was compiled on {device}, and this is {here}: its plans are "
        "the same, but operators that were chosen by their times there may not be the "
        "fastest here; asap_jax.choose among kept candidates, or compile the teacher "
        "here",
        stacklevel=5,
      )
  for where, site in found.items():
    differing = other_teacher(before[where], site.teacher)
    if differing:
      warnings.warn(
        f"model: its attention {site.name} is not the teacher that was compiled "
        f"({'; '.join(differing)}); what is loaded is the saved one",
        stacklevel=5,
      )


def _saved_names(saved: dict[str, Any]) -> list[str]:
  return [*saved["arrays"], *saved.get("values", {})]


def _renamed(name: str, names: Names, written: int) -> str:
  parts = name.split(".")
  if written == 2:
    return ".".join(names.now(parts))
  return arrays.name_of(names.now([unquote(part) for part in parts]))


def _matched(
  blanks: Mapping[str, Any], saved: dict[str, Any], now: Mapping[str, str]
) -> dict[str, Any]:
  """The model's own leaf of everything saved.

  Raises:
    ValueError: if there is another one, or none, or more.
  """
  lines = []
  by_name = {new: old for old, new in now.items()}
  for name in sorted(by_name.keys() | blanks.keys()):
    old = by_name.get(name)
    kept = None if old is None else _description(saved, old)
    own = arrays.describe(blanks[name]) if name in blanks else None
    if kept is None or own is None or not _fits(kept, own):
      lines.append(f"{name}: saved {_shown(kept)}, model {_shown(own)}")
  if lines:
    more = f", and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise ValueError(
      f"model has another structure than the saved one, in {len(lines)} variables: "
      f"{'; '.join(lines[:5])}{more}"
    )
  return {old: blanks[new] for old, new in now.items()}


def _description(saved: dict[str, Any], name: str) -> list[Any]:
  if name in saved.get("values", {}):
    return [type(saved["values"][name]).__name__]
  described = saved["arrays"][name]
  # What NumPy holds may have 64 bits that JAX, and a blank under eval_shape, has not.
  if name in saved.get("host", {}):
    return [*described, "NumPy"]
  return described


def _fits(kept: list[Any], own: list[Any]) -> bool:
  if len(kept) == 1:  # a number, which nnx.eval_shape makes an array
    return own == kept or own[0] == []
  if len(kept) == 3:
    return own[0] == kept[0] and (
      len(own) == 2
      and jax.dtypes.canonicalize_dtype(own[1])
      == jax.dtypes.canonicalize_dtype(kept[1])
    )
  return own == kept


def _shown(described: list[Any] | None) -> str:
  if described is None:
    return "nothing"
  if len(described) == 1:
    return str(described[0])
  shape, dtype, *_ = described
  return f"{dtype}[{','.join(map(str, shape))}]"


def _set_modes(loaded: nnx.Module, saved: dict[str, Any], names: Names) -> None:
  modules = {_place(path): module for path, module in nnx.iter_modules(loaded)}
  for path, name, value in saved.get("modes", ()):
    module = modules.get(_place(names.now(path)))
    if module is not None and isinstance(vars(module).get(name), bool):
      setattr(module, name, value)
