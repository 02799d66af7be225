"""Sizes of axes that are not known while JAX traces.

`jax.export` gives names to them, and what is exported serves arrays of all sizes. A
decision that rests on a size then has to be one that is right for all.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# An integer, or a symbol of `jax.export`: no class of their own to check.
Size = Any


def is_known(*sizes: Size) -> bool:
  """Whether all sizes are numbers.

  Example:
    >>> is_known(3, *jax.export.symbolic_shape("b, 4"))
    False
  """
  return not any(map(jax.export.is_symbolic_dim, sizes))


def at_most(size: Size, most: Size) -> bool | None:
  """Whether a size is up to another; `None` where nobody knows.

  Example:
    >>> (batch,) = jax.export.symbolic_shape("b")
    >>> at_most(3, 4), at_most(batch, 4), at_most(0, batch)
    (True, None, True)
  """
  if is_known(size, most):
    return bool(size <= most)
  try:
    return bool(size <= most)
  # The class of this error has moved between versions of JAX.
  except Exception:
    return None


def known_or(size: Size, usual: int) -> int:
  """The size, or what it is taken for where nobody knows it."""
  return int(size) if is_known(size) else usual


def as_number(size: Size) -> Any:
  """The size as a number to calculate with, an array where it is known only then."""
  return float(size) if is_known(size) else jnp.asarray(size, jnp.float32)


def known_behind(shape: Sequence[Size]) -> Sequence[int]:
  """The sizes behind the last one that is not known.

  Example:
    >>> known_behind(jax.export.symbolic_shape("2, b, 3, 4"))
    (3, 4)
  """
  unknown = [place for place, size in enumerate(shape) if not is_known(size)]
  return shape[unknown[-1] + 1 if unknown else 0 :]
