"""Directions of every layer of a teacher, as they are drawn at first."""

import warnings
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.recorded import Recorded
from asap_jax.masses import centre
from asap_jax.numerics import exact_einsum
from asap_jax.potentials import directions as slicing

DirectionKind = Literal["principal", "gaussian", "orthogonal"]


def draw_directions(
  teacher: Recorded, slices: int, kind: DirectionKind, seed: int
) -> list[jax.Array]:
  """Directions `[heads, slices, dim]` of each layer.

  `"principal"` reads the batches once: it takes the leading eigenvectors of the second
  moments of centred queries and keys, each scaled to trace one, added up, and no more
  than there are, with a warning. The others are random, by `seed`.

  Raises:
    ValueError: if `slices` is below one, or `kind` is unknown.
  """
  if slices < 1:
    raise ValueError(f"slices={slices}: expected at least 1")
  if kind == "principal":
    return _principal(teacher, slices)
  draw = {"gaussian": slicing.gaussian, "orthogonal": slicing.orthogonal}.get(kind)
  if draw is None:
    raise ValueError(
      f"directions={kind!r}: expected 'principal', 'gaussian' or 'orthogonal'"
    )
  keys = jax.random.split(jax.random.key(seed), len(teacher.layers))
  return [
    draw(key, layer.heads, slices, layer.dim)
    for key, layer in zip(keys, teacher.layers, strict=True)
  ]


def principal_directions(calls: Sequence[Activation], slices: int) -> jax.Array:
  """Principal directions of one layer, as those of `draw_directions`."""
  moments = sum(map(_second_moments, calls))
  balanced = _balanced(jnp.asarray(moments))
  return slicing.principal(balanced, min(slices, balanced.shape[-1]))


def _principal(teacher: Recorded, slices: int) -> list[jax.Array]:
  total = None
  for calls in teacher.activations("Drawing directions"):
    batch = [sum(map(_second_moments, of_layer)) for of_layer in calls]
    total = batch if total is None else jax.tree.map(jnp.add, total, batch)
  assert total is not None  # the first batch is never held out
  for layer in teacher.layers:
    if slices > layer.dim:
      warnings.warn(
        f"{layer.name}: slices={slices}, but heads of dimension {layer.dim} have no "
        f"more principal directions: {layer.dim} are taken. Pass slices={layer.dim}, "
        "or directions='orthogonal' for more of them",
        stacklevel=2,
      )
  return [
    slicing.principal(_balanced(moments), min(slices, layer.dim))
    for layer, moments in zip(teacher.layers, total, strict=True)
  ]


@jax.jit
def _second_moments(activation: Activation) -> jax.Array:
  """Second moments of centred queries and of centred keys, `[2, heads, dim, dim]`."""
  moments = []
  pairs = zip((activation.query, activation.key), activation.masks, strict=True)
  for points, mask in pairs:
    centred = centre(points, mask, axis=-2)
    moments.append(exact_einsum("bhnd,bhne->hde", centred, centred))
  return jnp.stack(moments)


def _balanced(moments: jax.Array) -> jax.Array:
  """Sum in which queries and keys count alike, whatever their scales."""
  traces = jnp.trace(moments, axis1=-2, axis2=-1)[..., None, None]
  return (moments / jnp.where(traces > 0, traces, 1.0)).sum(0)
