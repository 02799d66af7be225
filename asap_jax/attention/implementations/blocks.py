"""Working off a batch in blocks of one size."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.sizes import Size, at_most, is_known, known_behind

T = TypeVar("T")  # a pytree of arrays

# Pairs of tokens in a block that stays in a CPU's cache: 4 MiB of float32.
_PAIRS = 2**20


def block_size(total: int, most: int) -> int:
  """The largest divisor of `total` up to `most`, at least one.

  Blocks have one size, since a remainder would be compiled separately.
  """
  return next(s for s in range(max(min(most, total), 1), 0, -1) if total % s == 0)


def by_blocks(
  function: Callable[..., T],
  batch: Sequence[Size],
  most: int,
  arguments: Sequence[Array | None],
  own: Sequence[int],
) -> T:
  """`function` of at most `most` elements of the batch at a time, one after another.

  Of axes whose size is not known it takes one element at a time, right for all sizes.

  Args:
    function: of arguments with one batch axis, which its arrays have in front.
    batch: the batch axes of the arguments, up to broadcasting.
    most: elements in a block.
    arguments: arrays, or `None`.
    own: of each argument, the axes behind the batch axes.
  """
  size = block_size(math.prod(known_behind(batch)), most)

  def split(array, own):
    shape = array.shape[max(array.ndim - own, 0) :]
    array = jnp.broadcast_to(array, (*batch, *shape))
    return array.reshape(-1, size, *shape)

  blocks = [
    None if array is None else split(array, axes)
    for array, axes in zip(arguments, own, strict=True)
  ]
  found = jax.lax.map(lambda block: function(*block), blocks)
  return jax.tree.map(lambda out: out.reshape(*batch, *out.shape[2:]), found)


def in_cache(
  function: Callable[..., T],
  batch: Sequence[Size],
  pairs: Size,
  arguments: Sequence[Array | None],
  own: Sequence[int],
  most_pairs: Size = _PAIRS,
  *,
  elsewhere: Callable[..., T] | None = None,
) -> T:
  """`function` of the whole batch; on a CPU of blocks that stay in the cache.

  Args:
    function: see `by_blocks`, as all arguments not listed here.
    batch: see there.
    pairs: of tokens in one element of the batch.
    arguments: see there.
    own: see there.
    most_pairs: of a block.
    elsewhere: the same function for other devices than a CPU, if it has another form.
  """
  blocks = function
  if not at_most(math.prod(batch) * pairs, most_pairs):
    most = max(most_pairs // pairs, 1) if is_known(pairs) else 1
    blocks = functools.partial(_by_blocks_of, function, batch, most, own)
  elif elsewhere is None:
    return function(*arguments)
  return jax.lax.platform_dependent(
    *arguments, cpu=blocks, default=elsewhere or function
  )


def _by_blocks_of(function, batch, most, own, *arguments):
  return by_blocks(function, batch, most, arguments, own)
