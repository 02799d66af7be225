"""Samples of a teacher's calls that refinement keeps, and minibatches of them."""

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import plan
from asap_jax.compiler.operators import Sinkhorn


class Sample(NamedTuple):
  """Calls of a layer, with the sums of its teacher's plans that refinement needs.

  Attributes:
    activation: queries, keys and masks.
    columns: column sums of the teacher's plan, `[batch, heads, m]`.
    constant: part of KL(teacher || operator) that the operator does not change, summed
      over heads and rows, `[batch]`.
  """

  activation: Activation
  columns: jax.Array | np.ndarray
  constant: jax.Array | np.ndarray

  @property
  def size(self) -> int:
    """Number of sequences."""
    return self.constant.shape[0]


@jax.jit
def sample_of(activation: Activation, teacher: Sinkhorn) -> Sample:
  """Sample of one call, with the plans of a teacher."""
  logits, masks = activation.logits, activation.masks
  duals, _ = teacher.duals(activation)
  weights = plan(logits, duals, *masks)
  columns = weights.sum(-2)
  entropy = jnp.sum(duals.f * weights.sum(-1), -1) + jnp.sum(duals.g * columns, -1)
  return Sample(
    dataclasses.replace(activation, is_product=None), columns, entropy.sum(-1)
  )


def host_bytes(sample: Sample) -> int:
  """Bytes that a sample takes."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(sample))


def pooled(samples: Iterable[Sample]) -> list[Sample]:
  """Samples of equal shapes (but for their number of sequences) joined, on the host."""
  pools: dict[tuple, list[Sample]] = {}
  for sample in samples:
    leaves, structure = jax.tree.flatten(sample)
    shapes = tuple(leaf.shape[1:] for leaf in leaves)
    pools.setdefault((structure, shapes), []).append(sample)
  return [
    jax.tree.map(lambda *leaves: np.concatenate(leaves), *pool)
    for pool in pools.values()
  ]


def minibatches(
  pools: Sequence[Sample], size: int, random: np.random.Generator
) -> Iterator[Sample]:
  """Endless minibatches on the host, without replacement in each pass over the pools.

  Each comes from one pool and holds `size` sequences, or all of a smaller pool: every
  other size would be compiled for itself.
  """
  while True:
    waiting = []
    for pool in pools:
      count = min(size, pool.size)
      order = random.permutation(pool.size)
      for start in range(0, pool.size - count + 1, count):
        waiting.append((pool, np.sort(order[start : start + count])))
    random.shuffle(waiting)
    for pool, rows in reversed(waiting):
      yield jax.tree.map(operator.itemgetter(rows), pool)
