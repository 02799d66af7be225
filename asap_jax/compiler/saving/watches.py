"""What the watches of a model know, in its manifest, floats to the last bit."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax.compiler.records import dotted
from asap_jax.compiler.saving.names import Names
from asap_jax.compiler.watching import Watches, doubly_stochastic


def described(watches: Watches) -> list[dict[str, Any]]:
  """Watches as JSON takes them."""
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


def watches_of(model: nnx.Module, saved: Mapping[str, Any], names: Names) -> Watches:
  """What was saved, at the places of a loaded model.

  Raises:
    ValueError: if the manifest names other places, or none.
  """
  places = {dotted(place): place for place in doubly_stochastic(model)}
  watches: Watches = {}
  try:
    for watch in saved.get("watches", ()):
      where = ".".join(names.now((*watch["path"], watch["attribute"])))
      usual = jnp.asarray(watch["mean"]), jnp.asarray(watch["deviation"])
      watches[places[where]] = usual, watch["margin"]
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"the saved model's manifest is altered: its field 'watches' is none ({error!r})"
    ) from error
  return watches
