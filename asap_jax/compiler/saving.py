"""Saving and restoring a compiled model with Orbax.

A saved model is a directory: `arrays/`, an Orbax checkpoint of every variable, and
`manifest.json`, which names the sites, their dual maps, all arrays with shapes and
dtypes, and a digest of every file. Nothing in it is code: loading runs none.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from asap_jax.attention.amortized import DualLoss
from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.report import device_kind
from asap_jax.compiler.sites import (
  Replacement,
  find_held,
  find_sinkhorn,
  replace_sites,
)
from asap_jax.dual_map.predict import DualMap

FORMAT = 2
_MANIFEST, _ARRAYS = "manifest.json", "arrays"


def save(
  path: str | os.PathLike[str], model: nnx.Module, *, overwrite: bool = False
) -> None:
  """Writes a compiled model to a new directory, whole or not at all.

  Args:
    path: directory to create.
    model: a compiled model (`asap_jax.compile`), trained further or not.
    overwrite: whether a model already saved at `path` may be replaced.

  Raises:
    FileExistsError: if `path` exists and `overwrite` is false, or it exists and is not
      a saved model.
    ValueError: if `model` holds no compiled attention.

  Example:
    >>> import asap_jax, tempfile
    >>> build = lambda: nnx.Dict(attend=asap_jax.sinkhorn_attention)
    >>> dual_map = DualMap(jnp.ones((1, 1, 2)), jnp.ones((1, 2)), features=("query",))
    >>> compiled = nnx.Dict(attend=AsapAttention(dual_map))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(f"{folder}/model", compiled)
    ...   load(f"{folder}/model", build()).attend.dual_map.weights.tolist()
    [[1.0, 1.0]]
  """
  path = pathlib.Path(path).absolute()
  if path.exists() and not (overwrite and (path / _MANIFEST).is_file()):
    reason = (
      "is not a saved model" if overwrite else "pass overwrite=True to replace it"
    )
    raise FileExistsError(f"path={path} exists already: {reason}")
  sites = _saved_sites(model)
  compiled = AsapAttention, CandidateAttention, Replacement
  if not any(find_held(model, kind) for kind in compiled):
    raise ValueError("model holds no compiled attention: expected asap_jax.compile's")
  state = nnx.state(model, nnx.Not(nnx.Any(nnx.Intermediate, DualLoss)))
  arrays = _flat_state(state)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Beside the target, hence on the same file system: renaming it there is atomic.
  aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(aside / _ARRAYS, arrays)
      checkpointer.wait_until_finished()
    manifest = {
      "format": FORMAT,
      "versions": {"jax": jax.__version__, "orbax": ocp.__version__},
      # What is the fastest there may not be so elsewhere.
      "device": device_kind(),
      "sites": sites,
      "arrays": {name: _describe(array) for name, array in arrays.items()},
      "keys": _key_kinds(state),
      "files": _digests(aside),
    }
    manifest["digest"] = _digest(manifest)
    (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    if path.exists():
      # A directory that is not empty cannot be renamed over: the old one steps aside.
      old = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
      os.replace(path, old / path.name)
      os.replace(aside, path)
      shutil.rmtree(old)
    else:
      os.replace(aside, path)
  finally:
    shutil.rmtree(aside, ignore_errors=True)


def load(path: str | os.PathLike[str], model: nnx.Module) -> nnx.Module:
  """Restores a compiled model, equal to what was saved to the last bit.

  Args:
    path: directory that `save` wrote.
    model: an uncompiled model of the same architecture, as the constructor gives it
      or under `nnx.eval_shape`; its values do not matter and it is left untouched.

  Returns:
    The compiled model. A warning says so if it was saved on another kind of device.

  Raises:
    FileNotFoundError: if there is no saved model at `path`.
    ValueError: if the files are truncated, altered or of another format, or the model
      has another structure than the saved one.

  Example:
    >>> load("/nowhere", nnx.Dict())
    Traceback (most recent call last):
    FileNotFoundError: path=/nowhere: no saved model there (manifest.json is absent)
  """
  path = pathlib.Path(path).absolute()
  manifest = _read_manifest(path)
  _warn_elsewhere(path, manifest.get("device"))
  found = {(site.path, site.attribute): site for site in find_sinkhorn(model)}
  saved = {(tuple(s["path"]), s["attribute"]): s for s in manifest["sites"]}
  if found.keys() != saved.keys():
    raise ValueError(
      f"model has Sinkhorn attention at {sorted(map(str, found))}: the saved model has "
      f"it at {sorted(map(str, saved))}"
    )
  for where, site in found.items():
    bound, before = _describe_options(site.options), saved[where]["options"]
    if bound != before:
      raise ValueError(
        f"model binds {bound} to the attention {site.name}: saved was {before}"
      )
  blanks = [_blank_function(saved[where], found[where].options) for where in found]
  compiled = replace_sites(model, list(found.values()), blanks)
  # Sown values are no part of a saved model.
  nnx.pop(compiled, nnx.Intermediate)
  graph, state = nnx.split(compiled)
  expected = {name: _describe(array) for name, array in _flat_state(state).items()}
  _check_same_arrays(expected, manifest["arrays"])
  abstract = {
    name: jax.ShapeDtypeStruct(tuple(shape), dtype)
    for name, (shape, dtype) in expected.items()
  }
  with ocp.StandardCheckpointer() as checkpointer:
    arrays = checkpointer.restore(path / _ARRAYS, abstract)
  arrays = jax.tree.map(_uncommitted, arrays)
  return nnx.merge(graph, _with_arrays(state, arrays, manifest["keys"]))


def _uncommitted(array: jax.Array) -> jax.Array:
  """An array of one device, free to join others that are spread over several."""
  return array if len(array.devices()) > 1 else jnp.asarray(np.asarray(array))


def _warn_elsewhere(path: pathlib.Path, saved: str | None) -> None:
  """Operators are chosen for a kind of device; older models do not name theirs."""
  here = device_kind()
  if saved not in (None, here):
    warnings.warn(
      f"path={path} was saved on {saved}, and this is {here}: its plans are the same, "
      "but operators that were chosen by their times there may not be the fastest "
      "here; asap_jax.choose among kept candidates, or compile the teacher here",
      stacklevel=3,
    )


def _flat_state(state: nnx.State) -> dict[str, Any]:
  """Every variable's array, real or abstract, by path; PRNG keys as raw data."""
  flat = {}
  for path, variable in nnx.to_flat_state(state):
    value = variable.get_value()
    if _is_key(value):
      abstract = isinstance(value, jax.ShapeDtypeStruct)
      raw = jax.random.key_data
      value = jax.eval_shape(raw, value) if abstract else raw(value)
    flat[_name(path)] = value
  return flat


def _with_arrays(
  state: nnx.State, arrays: dict[str, jax.Array], keys: dict[str, str]
) -> nnx.State:
  """`state` with these arrays in the place of its own."""
  flat = []
  for path, variable in nnx.to_flat_state(state):
    array = arrays[_name(path)]
    if _is_key(variable.get_value()):
      array = jax.random.wrap_key_data(array, impl=keys[_name(path)])
    flat.append((path, variable.replace(array)))
  return nnx.from_flat_state(flat)


def _key_kinds(state: nnx.State) -> dict[str, str]:
  return {
    _name(path): str(jax.random.key_impl(variable.get_value()))
    for path, variable in nnx.to_flat_state(state)
    if _is_key(variable.get_value())
  }


def _is_key(value: Any) -> bool:
  return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _name(path: tuple[Any, ...]) -> str:
  return ".".join(map(str, path))


def _describe(array: Any) -> list[Any]:
  return [list(array.shape), np.dtype(array.dtype).name]


def _digests(directory: pathlib.Path) -> dict[str, str]:
  return {
    file.relative_to(directory).as_posix(): hashlib.sha256(
      file.read_bytes()
    ).hexdigest()
    for file in sorted(directory.rglob("*"))
    if file.is_file()
  }


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  if not (path / _MANIFEST).is_file():
    raise FileNotFoundError(
      f"path={path}: no saved model there ({_MANIFEST} is absent)"
    )
  try:
    manifest = json.loads((path / _MANIFEST).read_text())
    written, files = manifest["format"], manifest["files"]
    intact = manifest.pop("digest") == _digest(manifest)
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"path={path}: {_MANIFEST} is truncated or altered") from error
  if written != FORMAT:
    raise ValueError(
      f"path={path} has format {written}: this version of asap_jax reads {FORMAT}"
    )
  if not intact:
    raise ValueError(f"path={path}: {_MANIFEST} is truncated or altered")
  present = _digests(path)
  broken = [name for name, digest in files.items() if present.get(name) != digest]
  if broken:
    raise ValueError(f"path={path}: truncated, altered or absent: {', '.join(broken)}")
  return manifest


def _saved_sites(model: nnx.Module) -> list[dict[str, Any]]:
  """What stands at every site: a dual map, iterations, or candidates of both."""
  kept = find_held(model, CandidateAttention)
  inside = [(*path, attribute) for path, attribute in kept]
  found = {
    (path, attribute): (dict(held.options), _describe_map(held))
    for (path, attribute), held in find_held(model, AsapAttention).items()
    if not any(path[: len(above)] == above for above in inside)
  }
  for site in find_sinkhorn(model):
    where = site.path, site.attribute
    found[where] = site.options, dataclasses.asdict(site.teacher)
  for where, several in kept.items():
    found[where] = dict(several.options), _describe_candidates(several)
  return [
    {
      "path": list(path),
      "attribute": attribute,
      "options": _describe_options(options),
      **described,
    }
    for (path, attribute), (options, described) in found.items()
  ]


def _describe_map(held: AsapAttention) -> dict[str, Any]:
  return {
    "features": list(held.features),
    # Only where it is no query-side map, as all were once.
    **({"side": held.side, "half": held.half} if held.side == "key" else {}),
    "parameters": {
      name: _describe(leaf) for name, leaf in held.dual_map.to_named().items()
    },
  }


def _describe_candidates(kept: CandidateAttention) -> dict[str, Any]:
  return {
    "chosen": kept.chosen,
    "tvs": dict(kept.tvs),
    "candidates": {
      label: _describe_map(held)
      if isinstance(held, AsapAttention)
      else dataclasses.asdict(held)
      for label, held in kept.operators.items()
    },
  }


def _blank_function(
  saved: dict[str, Any], options: dict[str, Any]
) -> Callable[..., jax.Array]:
  """What stood at a saved site, with zeros for its arrays."""
  if "candidates" in saved:
    blanks = {k: _blank(each, options) for k, each in saved["candidates"].items()}
    return CandidateAttention(blanks, saved["tvs"], saved["chosen"], options)
  blank = _blank(saved, options)
  if isinstance(blank, AsapAttention):
    return blank
  return Replacement(blank.attention_fn, **options)


def _blank(saved: dict[str, Any], options: dict[str, Any]) -> Sinkhorn | AsapAttention:
  if "parameters" not in saved:
    names = [field.name for field in dataclasses.fields(Sinkhorn)]
    return Sinkhorn(**{name: saved[name] for name in names if name in saved})
  leaves = {
    name: jnp.zeros(shape, dtype)
    for name, (shape, dtype) in saved["parameters"].items()
  }
  static = {name: saved[name] for name in ("side", "half") if name in saved}
  dual_map = DualMap.from_named(leaves, tuple(saved["features"]), **static)
  return AsapAttention(dual_map, options)


def _describe_options(options: dict[str, Any]) -> dict[str, str]:
  # Arrays are bound by the architecture, and are no names.
  return {
    name: repr(value)
    for name, value in sorted(options.items())
    if not isinstance(value, jax.Array | np.ndarray)
  }


def _digest(manifest: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_same_arrays(
  expected: dict[str, list[Any]], saved: dict[str, list[Any]]
) -> None:
  lines = [
    f"{name}: saved {saved.get(name, 'nothing')}, model {expected.get(name, 'nothing')}"
    for name in sorted(expected.keys() | saved.keys())
    if expected.get(name) != saved.get(name)
  ]
  if lines:
    raise ValueError(
      f"model has another structure than the saved one, in {len(lines)} arrays "
      f"[shape, dtype]: {'; '.join(lines[:5])}"
    )
