"""What refinement keeps of a teacher's calls, and draws its minibatches from."""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax.c_transform.entropic import closure, plan
from asap_jax.compiler.sites import Activation
from asap_jax.teacher.sinkhorn import sinkhorn_source_dual


class Sample(NamedTuple):
  """Calls of a layer, with what refinement needs of its teacher.

  Attributes:
    activation: queries, keys and masks.
    columns: column sums of the teacher's plan, `[batch, heads, m]`.
    constant: the part of KL(teacher || operator) that the operator does not change,
      summed over heads and rows, `[batch]`.
  """

  activation: Activation
  columns: jax.Array | np.ndarray
  constant: jax.Array | np.ndarray

  @property
  def size(self) -> int:
    """Number of sequences."""
    return self.constant.shape[0]


@functools.partial(jax.jit, static_argnames="iterations")
def sample_of(activation: Activation, iterations: int) -> Sample:
  """The sample of one call, for a teacher of so many full iterations."""
  logits = activation.logits
  masks = activation.query_mask, activation.key_mask
  source = sinkhorn_source_dual(logits, iterations, *masks)
  duals = closure(logits, source, *masks)
  teacher = plan(logits, duals, *masks)
  columns = teacher.sum(-2)
  entropy = jnp.sum(duals.f * teacher.sum(-1), -1) + jnp.sum(duals.g * columns, -1)
  return Sample(activation._replace(is_product=None), columns, entropy.sum(-1))


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


class Minibatches:
  """Endless minibatches from pools of samples, without replacement in each pass.

  Args:
    pools: of which each minibatch comes from one; see `pooled`.
    size: sequences in a minibatch; fewer where a pool has fewer.
    random: generator that draws the order.
  """

  def __init__(self, pools: Sequence[Sample], size: int, random: np.random.Generator):
    self._pools = pools
    self._size = size
    self._random = random
    self._waiting: list[tuple[int, np.ndarray]] = []

  def __next__(self) -> Sample:
    """The next minibatch, on the host."""
    if not self._waiting:
      self._waiting = [
        (index, np.sort(rows))
        for index, pool in enumerate(self._pools)
        for rows in self._rows(pool.size)
      ]
      self._random.shuffle(self._waiting)
    index, rows = self._waiting.pop()
    return jax.tree.map(lambda leaf: leaf[rows], self._pools[index])

  def __iter__(self) -> "Minibatches":
    return self

  def _rows(self, count: int) -> list[np.ndarray]:
    # Whole minibatches only: another size would be compiled anew.
    size = min(self._size, count)
    order = self._random.permutation(count)
    return [order[i : i + size] for i in range(0, count - size + 1, size)]
