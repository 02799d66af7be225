"""Packed sequences: several in one row of tokens, each with a plan of its own.

The plan of all of them is block-diagonal. Its kernel is zero between tokens of
different segments, so that iterations never see more than one, and its marginals are
those of each block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from asap_jax.c_transform.entropic import LOG_ZERO
from asap_jax.sizes import is_known


class Segments(NamedTuple):
  """Which of the packed sequences each token belongs to, counted from one.

  Attributes:
    query: `[..., n]`, zero at padding.
    key: `[..., m]`, likewise.
  """

  query: Int[Array, "... n"]
  key: Int[Array, "... m"]

  @property
  def same(self) -> Bool[Array, "... n m"]:
    """Pairs of tokens of one segment."""
    valid = (self.query > 0)[..., :, None]
    return valid & (self.query[..., :, None] == self.key[..., None, :])

  @property
  def log_kernel(self) -> Float[Array, "... n m"]:
    """Zero inside of a segment, and far below all logits between two."""
    # A sum instead of a select, with which XLA would make slower loops.
    return LOG_ZERO * (self.query[..., :, None] != self.key[..., None, :])

  @property
  def masses(self) -> tuple[Bool[Array, "... n"], Float[Array, "... m"]]:
    """Valid queries, and what the plan is to have in each key's column.

    A segment without queries, or without keys, has no plan: it counts as padding.
    """
    valid = self.query > 0
    valid &= _count(self.key, self.query) > 0
    # All keys of a segment have as many queries as it has, and share them.
    queries, keys = (_count(ids, self.key) for ids in (self.query, self.key))
    shared = queries.astype(jnp.float32) / jnp.maximum(keys, 1).astype(jnp.float32)
    return valid, jnp.where(self.key > 0, shared, 0.0)


def segments_of(
  mask: Bool[Array, "... n m"],
) -> tuple[Segments, Bool[Array, "... 1 1"]]:
  """The segments of a block-diagonal mask, in the order of their first keys.

  Works under jit and vmap; no gradient is defined.

  Args:
    mask: pairs of tokens that belong together, `[..., n, m]`.

  Returns:
    The segments, and whether they are what the mask says: queries that share a key
    share all of them.
  """
  m = mask.shape[-1]
  places = jnp.arange(m)
  first = jnp.where(mask, places, m).min(-1)  # of a query: m if it has none
  shared = jnp.where(mask, first[..., :, None], m).min(-2)  # of a key: likewise
  leads = shared == places

  def counted(first: Array) -> Array:
    upto = leads[..., None, :] & (places <= first[..., None])
    return jnp.where(first < m, upto.sum(-1), 0)

  found = Segments(counted(first), counted(shared))
  return found, (found.same == mask).all((-2, -1), keepdims=True)


def _count(ids: Array, wanted: Array) -> Array:
  """How many of `[..., n]` are as each of those wanted, without looking at pairs."""
  if not is_known(ids.shape[-1], wanted.shape[-1]):
    # JAX searches no array of unknown length; nothing of these pairs is kept.
    return (ids[..., None, :] == wanted[..., :, None]).sum(-1)
  find = jnp.vectorize(
    lambda ids, wanted: (
      jnp.searchsorted(ids, wanted, side="right") - jnp.searchsorted(ids, wanted)
    ),
    signature="(n),(m)->(m)",
  )
  return find(jnp.sort(ids), wanted)


def by_segment(
  function: Callable[[Array, Array], Float[Array, "..."]],
  segments: Segments,
  count: int,
) -> Float[Array, "..."]:
  """What a function of masks gives for one segment after another, in one array.

  Args:
    function: of valid queries `[..., n]` and valid keys `[..., m]`; zero at points of
      the side that it is of which are not valid.
    segments: up to `count`.
    count: calls of `function`, which follow one another, so that memory is that of one.
  """

  # Nothing of a segment is kept for the backward pass, which computes it anew.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add(total, segment):
    return total + function(segments.query == segment, segments.key == segment), None

  of_first = jax.eval_shape(function, segments.query == 1, segments.key == 1)
  zeros = jnp.zeros(of_first.shape, of_first.dtype)
  return jax.lax.scan(add, zeros, jnp.arange(1, count + 1))[0]
