"""A model that is saved again and again, and what stands at a path."""

import pathlib
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import asap_jax
from asap_jax.compiler.saving import folders

# Noise, which does not become smaller on the disk.
_NOISE = np.random.default_rng(0).uniform(1, 2, (96, 128)).astype(np.float32)


class Model(nnx.Module):
  """Attention and an array, each a number times what it always is."""

  def __init__(self, attend, number=0.0):
    self.attend = attend
    self.body = nnx.Param(jnp.asarray(number * _NOISE, jnp.float32))


def tally(method: str, *counts: str) -> dict[str, Any]:
  """A row of zeros: how often something was tried, what came of it, what was lost."""
  return {"method": method, **dict.fromkeys(("tried", *counts, "lost"), 0)}


def blank() -> Model:
  return Model(asap_jax.sinkhorn_attention)


def compiled(number: float) -> Model:
  dual_map = asap_jax.DualMap(
    jnp.ones((2, 1, 4)), jnp.full((2, 4), number), features=("query",)
  )
  return Model(asap_jax.AsapAttention(dual_map), number)


def number_at(path: pathlib.Path) -> float:
  """The number of the model at a path; a ValueError if it is not all of one."""
  with warnings.catch_warnings():
    # Of another device, where the manifest was altered.
    warnings.simplefilter("ignore")
    model: Any = asap_jax.load(path, blank())
  weights = np.asarray(model.attend.dual_map.weights)
  number = float(weights[0, 0])
  whole = compiled(number)
  for found, expected in (
    (weights, whole.attend.dual_map.weights),
    (model.body[...], whole.body[...]),
  ):
    if not np.array_equal(found, expected):
      raise ValueError(f"path={path}: a mixture of models, the first {number}")
  return number


def litter(path: pathlib.Path) -> int:
  """How many files and folders there are beside a model and its one version."""
  beside = [each for each in path.parent.iterdir() if each != path]
  inside = [each for each in path.iterdir() if each.name != folders.MANIFEST]
  return len(beside) + len(inside) - 1
