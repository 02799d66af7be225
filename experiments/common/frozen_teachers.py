"""Frozen teachers from files: pre-norm Transformer encoders with Sinkhorn attention.

A file `NAME.npz` holds `emb`, `pos`, `out` and, per layer i, `qkv{i}`, `o{i}`, `m1{i}`,
`m2{i}`: no biases, layer norms without gain, GELU, mean pooling over valid tokens. An
embedding of 3 * patch^2 rows is of images, any other of tokens, with 0 as padding.
`NAME_inputs.npz` holds `xtrain`, `xtest` and `ytest`.
"""

import functools
import math
import pathlib
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax.attention.functions import sinkhorn_attention

ITERATIONS = 20


class FrozenInputs(NamedTuple):
  """Unlabelled inputs to calibrate on, and a labelled test set."""

  train: np.ndarray
  test: np.ndarray
  labels: np.ndarray


class FrozenLayer(nnx.Module):
  """Attention and MLP with weights that are given."""

  def __init__(self, weights: dict[str, np.ndarray], layer: int, heads: int):
    self.qkv, self.out, self.mlp_in, self.mlp_out = (
      nnx.Param(jnp.asarray(weights[f"{name}{layer}"], jnp.float32))
      for name in ("qkv", "o", "m1", "m2")
    )
    self.heads = heads
    self.attention_fn = functools.partial(
      sinkhorn_attention, iterations=ITERATIONS, implementation="ott"
    )

  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`[batch, n, width]` to an array like it; `mask` as in attention functions."""
    projected = jnp.split(_layer_norm(x) @ self.qkv[...], 3, axis=-1)
    query, key, value = (
      part.reshape(*x.shape[:2], self.heads, -1) for part in projected
    )
    attended = self.attention_fn(query, key, value, mask=mask).reshape(x.shape)
    x = x + attended @ self.out[...]
    return x + nnx.gelu(_layer_norm(x) @ self.mlp_in[...]) @ self.mlp_out[...]


class FrozenTeacher(nnx.Module):
  """Images (uint8) or token ids (int32) to class logits."""

  def __init__(self, weights: dict[str, np.ndarray], heads: int):
    count = sum(name.startswith("qkv") for name in weights)
    self.emb, self.pos, self.head = (
      nnx.Param(jnp.asarray(weights[name], jnp.float32))
      for name in ("emb", "pos", "out")
    )
    self.layers = nnx.List([FrozenLayer(weights, i, heads) for i in range(count)])

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Class logits `[batch, classes]`."""
    if inputs.ndim == 4:
      x, valid, mask = _patches(inputs, self.emb.shape[0]) @ self.emb[...], None, None
    else:
      # A sequence without a token keeps its first place: a mean of nothing is NaN.
      valid = (inputs > 0).at[:, 0].set(True)
      mask = nnx.make_attention_mask(valid, valid)
      x = 8.0 * self.emb[...][inputs]
    x = x + self.pos[...]
    for layer in self.layers:
      x = layer(x, mask)
    weight = jnp.ones((*x.shape[:2], 1)) if valid is None else valid[..., None]
    return ((_layer_norm(x) * weight).sum(1) / weight.sum(1)) @ self.head[...]


def load_teacher(path: pathlib.Path, heads: int) -> FrozenTeacher:
  """Reads a teacher's weights.

  Raises:
    ValueError: if arrays are missing or `heads` does not divide the width.
  """
  needed = {"emb", "pos", "out", "qkv0", "o0", "m10", "m20"}
  weights = _read(path, needed, "a teacher's weights")
  width = weights["emb"].shape[1]
  if width % heads:
    raise ValueError(f"heads={heads}: expected a divisor of the width {width}")
  return FrozenTeacher(weights, heads)


def load_inputs(path: pathlib.Path, test_limit: int | None) -> FrozenInputs:
  """Reads inputs; `test_limit` keeps the first so many test examples.

  Raises:
    ValueError: if arrays are missing.
  """
  found = _read(path, {"xtrain", "xtest", "ytest"}, "inputs")
  return FrozenInputs(
    found["xtrain"], found["xtest"][:test_limit], found["ytest"][:test_limit]
  )


def _read(path: pathlib.Path, needed: set[str], kind: str) -> dict[str, np.ndarray]:
  """All arrays of a file."""
  try:
    found = np.load(path)
    arrays = dict(found) if isinstance(found, np.lib.npyio.NpzFile) else None
  except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} cannot be read: {error}") from None
  if arrays is None:
    raise ValueError(f"{path} holds one array: expected {kind} in a .npz file")
  if missing := needed - arrays.keys():
    raise ValueError(f"{path} lacks {sorted(missing)}: expected {kind}")
  return arrays


def _patches(images: jax.Array, size: int) -> jax.Array:
  """Images `[batch, side, side, 3]` to flat patches in [-1, 1], `[batch, n, size]`."""
  patch = math.isqrt(size // 3)
  batch, side = images.shape[0], images.shape[1] // patch
  x = images / 127.5 - 1.0
  x = x.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, side * side, size)


def _layer_norm(x: jax.Array) -> jax.Array:
  x = x - x.mean(-1, keepdims=True)
  return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)
