"""`asap_jax.save` and `asap_jax.load`."""

import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax.compiler.records import compiled_places
from asap_jax.compiler.report import device_kind
from asap_jax.compiler.saving import arrays, folders, manifest, options
from asap_jax.compiler.saving.names import Names
from asap_jax.compiler.saving.sites import (
  blank_at,
  described_sites,
  other_teacher,
)
from asap_jax.compiler.sites import Site, find_sinkhorn, replace_sites
from asap_jax.compiler.watching import Watches, doubly_stochastic, unwatched, watched_as

# Set by `model.train()` and `model.eval()`.
_MODES = "deterministic", "use_running_average"
_TRIES = 100


def save(
  path: str | os.PathLike[str], model: nnx.Module, *, overwrite: bool = False
) -> None:
  """Writes a compiled model to a new directory, whole or not at all.

  Whoever is stopped while writing leaves the model that was there, or the new one;
  who reads meanwhile gets one of them. What stopped saves left is cleared.

  Args:
    path: directory to create, of a file system; `~` is expanded.
    model: a compiled model (`asap_jax.compile`), trained further or not.
    overwrite: whether a model already saved at `path` may be replaced.

  Raises:
    FileExistsError: if `path` exists and `overwrite` is false, or it exists and is not
      a saved model.
    OSError: if it cannot be written.
    ValueError: if `model` holds no compiled attention or no values, or `path` is the
      address of a remote store.

  Example:
    >>> import asap_jax, jax.numpy as jnp, tempfile
    >>> build = lambda: nnx.Dict(attend=asap_jax.sinkhorn_attention)
    >>> dual_map = asap_jax.DualMap(
    ...   jnp.ones((1, 1, 2)), jnp.ones((1, 2)), features=("query",))
    >>> compiled = nnx.Dict(attend=asap_jax.AsapAttention(dual_map))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(f"{folder}/model", compiled)
    ...   load(f"{folder}/model", build()).attend.dual_map.weights.tolist()
    [[1.0, 1.0]]
  """
  target = folders.local(path)
  _check_module(model)
  model, watches = unwatched(model)
  if not compiled_places(model):
    raise ValueError("model holds no compiled attention: expected asap_jax.compile's")
  split = arrays.Split(arrays.leaves_of(nnx.state(model, arrays.KEPT)))
  sites = described_sites(model)
  folders.check_free(target, overwrite)
  folders.clear_litter(target)
  with folders.new_version(target) as version:
    arrays.write(version / folders.ARRAYS, split.arrays)
    text = manifest.to_text(
      {
        "versions": manifest.versions(),
        # Where it was saved; where it was chosen stands in the records.
        "device": device_kind(),
        "sites": sites,
        "modes": _modes(model),
        "watches": _described_watches(watches),
        "arrays": split.described,
        "keys": split.keys,
        "host": split.host,
        "values": split.values,
        "folder": version.name,
        "files": manifest.digests(version),
      }
    )
    folders.publish(version, target, text, overwrite=overwrite)
  folders.clear_litter(target)


def load(
  path: str | os.PathLike[str],
  model: nnx.Module,
  *,
  names: Mapping[str, str] | None = None,
) -> nnx.Module:
  """Restores a compiled model, equal to what was saved to the last bit.

  Arrays come to where `model` has its own: onto its shardings, or free to join any.

  Args:
    path: directory that `save` wrote.
    model: an uncompiled model of the same architecture, as the constructor gives it
      or under `nnx.eval_shape`; its values do not matter and it is left untouched.
    names: new paths of modules and variables by old ones, where attributes were
      renamed: `{"blocks": "encoder.layers"}`.

  Returns:
    The compiled model, in training or evaluation mode as it was saved. A warning says
    so if operators were chosen on another kind of device, or for a teacher of other
    iterations.

  Raises:
    FileNotFoundError: if there is no saved model at `path`.
    ValueError: if the files are truncated, altered or of another format, or the model
      has another structure than the saved one, or is compiled already.

  Example:
    >>> load("/nowhere", nnx.Dict())
    Traceback (most recent call last):
    FileNotFoundError: path=/nowhere: no saved model there (manifest.json is absent)
  """
  source = folders.local(path)
  _check_module(model)
  if compiled_places(model):
    raise ValueError(
      "model is compiled already: expected the uncompiled model, as its constructor "
      "gives it"
    )
  for tries in range(_TRIES):
    saved = manifest.read(source)
    with folders.reading(manifest.home(source, saved)):
      # It may have been replaced before it was held, or where nothing can be held.
      if manifest.read(source) != saved:
        continue
      try:
        return _restored(source, saved, model, names)
      except Exception:
        if tries == _TRIES - 1 or manifest.read(source) == saved:
          raise
  raise OSError(f"path={source}: replaced again and again while it was read")


def _check_module(model: Any) -> None:
  if not isinstance(model, nnx.Module):
    kind = type(model)
    raise ValueError(
      f"model is a {kind.__module__}.{kind.__qualname__}: expected a Flax NNX module"
    )


def _modes(model: nnx.Module) -> list[list[Any]]:
  """Whether modules are in training mode, by path and attribute."""
  return [
    [list(path), name, vars(module)[name]]
    for path, module in nnx.iter_modules(model)
    for name in _MODES
    if isinstance(vars(module).get(name), bool)
  ]


def _restored(
  source: pathlib.Path,
  saved: dict[str, Any],
  model: nnx.Module,
  changed: Mapping[str, str] | None,
) -> nnx.Module:
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
  loaded = watched_as(loaded, _watches(loaded, saved, names))
  _set_modes(loaded, saved, names)
  return loaded


def _described_watches(watches: Watches) -> list[dict[str, Any]]:
  """What the watches know, as JSON takes it: floats are written to the last bit."""
  return [
    {
      "path": list(path),
      "attribute": attribute,
      "mean": np.asarray(mean).tolist(),
      "deviation": np.asarray(deviation).tolist(),
      "margin": margin,
    }
    for (path, attribute), ((mean, deviation), margin) in watches.items()
  ]


def _watches(model: nnx.Module, saved: dict[str, Any], names: Names) -> Watches:
  """The places of a loaded model where there was a watch, and what it knew."""
  places = {
    _place((*path, attribute)): (path, attribute)
    for path, attribute in doubly_stochastic(model)
  }
  return {
    places[_place(names.now((*watch["path"], watch["attribute"])))]: (
      (jnp.asarray(watch["mean"]), jnp.asarray(watch["deviation"])),
      watch["margin"],
    )
    for watch in saved.get("watches", ())
  }


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
