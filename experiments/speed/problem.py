"""Inputs of `experiments.speed`, and dual maps of them that need no teacher."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from asap_jax.dual_map.features import COMPILED, dual_features
from asap_jax.dual_map.network import init_network
from asap_jax.dual_map.predict import DualMap
from asap_jax.potentials.directions import gaussian
from experiments.common.padding import pairs_of, ragged
from experiments.speed.attentions import heads_first

HIDDEN = 64  # as `asap_jax.compile` has it


class Shape(NamedTuple):
  """Shape of self-attention, the dtype of its inputs, and whether they are padded.

  A padded batch has sequences of a quarter of the length to all of it.
  """

  batch: int
  heads: int
  length: int
  head_dim: int
  dtype: str
  padded: bool = False

  @property
  def matrix_bytes(self) -> int:
    """A float32 matrix of all pairs of tokens, of every head of every sequence."""
    return 4 * self.batch * self.heads * self.length**2


class Problem(NamedTuple):
  """Inputs of one shape, and the options of the methods.

  Attributes:
    shape: of the inputs.
    inputs: queries, keys and values, normal, so that logits have deviation one.
    mask: of pairs of valid tokens, `None` where all are valid.
    slices: numbers of slices to try; all methods but `asap` take the first.
    iterations: full iterations of the teacher.
    seed: of the dual maps.
    device: `"cpu"`, `"gpu"` or `"tpu"`.
  """

  shape: Shape
  inputs: tuple[jax.Array, jax.Array, jax.Array]
  mask: jax.Array | None
  slices: tuple[int, ...]
  iterations: int
  seed: int
  device: str


def make_problem(
  shape: Shape, slices: Sequence[int], iterations: int, seed: int
) -> Problem:
  """Draws the inputs."""
  batch, heads, length, dim, dtype, padded = shape
  rngs = jax.random.split(jax.random.key(seed), 3)
  query, key, value = (
    jax.random.normal(rng, (batch, length, heads, dim)).astype(dtype) for rng in rngs
  )
  device = jax.default_backend()
  mask = pairs_of(ragged(batch, length)) if padded else None
  inputs = query, key, value
  return Problem(shape, inputs, mask, tuple(slices), iterations, seed, device)


def random_dual_map(problem: Problem, slices: int, hidden: int) -> DualMap:
  """A dual map whose linear part and network each have deviation about one half."""
  query, key = (x[:1, :, :256] for x in heads_first(*problem.inputs[:2]))
  heads, dim = query.shape[1], query.shape[-1]
  rngs = jax.random.split(jax.random.key(problem.seed), 4)
  directions = gaussian(rngs[0], heads, slices, dim)
  deviation = _deviation(query, key, directions)
  count = deviation.shape[-1]
  weights = 0.5 * count**-0.5 * jax.random.normal(rngs[1], (heads, count))
  dual_map = DualMap(directions, weights / deviation, COMPILED)
  if not hidden:
    return dual_map
  network = init_network(rngs[2], heads, dim, count, hidden)
  # Of the context, the last entries are the features' own deviations.
  of_context = jnp.ones(network.context_shift.shape).at[:, -count:].set(deviation)
  network = replace(
    network,
    feature_kernel=network.feature_kernel / deviation[..., None],
    context_kernel=network.context_kernel / of_context[..., None],
    output=0.5 * hidden**-0.5 * jax.random.normal(rngs[3], (heads, hidden)),
  )
  return replace(dual_map, network=network)


@jax.jit
def _deviation(query, key, directions):
  return dual_features(query, key, directions, COMPILED).std((0, 2)) + 1e-6
