"""Working off a batch in blocks of one size."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array


def block_size(total: int, most: int) -> int:
  """The largest divisor of `total` up to `most`, at least one.

  Blocks have one size, since a remainder would be compiled separately.
  """
  return next(s for s in range(max(min(most, total), 1), 0, -1) if total % s == 0)


def by_blocks(
  function: Callable[..., Array],
  batch: Sequence[int],
  most: int,
  arguments: Sequence[Array | None],
  own: Sequence[int],
) -> Array:
  """`function` of at most `most` elements of the batch at a time, one after another.

  Args:
    function: of arguments with one batch axis.
    batch: the batch axes of the arguments, up to broadcasting.
    most: elements in a block.
    arguments: arrays, or `None`.
    own: of each argument, the axes behind the batch axes.
  """
  size = block_size(math.prod(batch), most)

  def split(array, own):
    shape = array.shape[max(array.ndim - own, 0) :]
    array = jnp.broadcast_to(array, (*batch, *shape))
    return array.reshape(-1, size, *shape)

  blocks = [
    None if array is None else split(array, axes)
    for array, axes in zip(arguments, own, strict=True)
  ]
  out = jax.lax.map(lambda block: function(*block), blocks)
  return out.reshape(*batch, *out.shape[2:])
