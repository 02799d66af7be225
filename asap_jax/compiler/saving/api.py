"""`asap_jax.save` and `asap_jax.load`."""

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx

from asap_jax.compiler.records import compiled_places
from asap_jax.compiler.report import device_kind
from asap_jax.compiler.saving import arrays, folders, manifest, watches
from asap_jax.compiler.saving.restoring import restored
from asap_jax.compiler.saving.sites import described_sites
from asap_jax.compiler.sites import check_is_nnx
from asap_jax.compiler.watching import unwatched

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
  check_is_nnx(model)
  model, watched = unwatched(model)
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
        "watches": watches.described(watched),
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
    OSError: if it is replaced again and again while it is read.
    ValueError: if the files are truncated, altered or of another format, or the model
      has another structure than the saved one, or is compiled already.

  Example:
    >>> load("/nowhere", nnx.Dict())
    Traceback (most recent call last):
    FileNotFoundError: path=/nowhere: no saved model there (manifest.json is absent)
  """
  source = folders.local(path)
  check_is_nnx(model)
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
        return restored(source, saved, model, names)
      except Exception:
        if tries == _TRIES - 1 or manifest.read(source) == saved:
          raise
  raise OSError(f"path={source}: replaced again and again while it was read")


def _modes(model: nnx.Module) -> list[list[Any]]:
  """Whether modules are in training mode, by path and attribute."""
  return [
    [list(path), name, vars(module)[name]]
    for path, module in nnx.iter_modules(model)
    for name in _MODES
    if isinstance(vars(module).get(name), bool)
  ]
