"""Sizes that a served model leaves open, in the notation of `jax.export`."""

from collections.abc import Sequence
from typing import Any

import jax

# One such text for all inputs, or a tree of them as the inputs are.
Symbolic = Any


def open_shapes(
  arguments: tuple[Any, ...], symbolic: Symbolic, constraints: Sequence[str]
) -> tuple[Any, ...]:
  """Shapes and dtypes of arguments, with the sizes that are left open.

  All but the first of an array are taken for lengths, of two tokens at least: one token
  has no doubly stochastic attention.

  Args:
    arguments: shapes and dtypes.
    symbolic: see `asap_jax.export`.
    constraints: likewise.

  Raises:
    ValueError: if `symbolic` does not fit the arguments.
  """
  if symbolic is None:
    if constraints:
      raise ValueError(
        f"constraints={tuple(constraints)} with symbolic=None: expected none, for no "
        "size is open"
      )
    return arguments
  named = _shapes(arguments, symbolic, ())
  _check_sizes(arguments, named, symbolic)
  leaves = jax.tree.leaves(named)
  batches = {str(leaf.shape[0]) for leaf in leaves if leaf.shape}
  sizes = {str(size) for leaf in leaves for size in leaf.shape if _is_name(size)}
  least = [f"{name} >= 2" for name in sorted(sizes - batches)]
  return _shapes(arguments, symbolic, (*least, *constraints))


def _shapes(
  arguments: tuple[Any, ...], symbolic: Symbolic, constraints: Sequence[str]
) -> tuple[Any, ...]:
  try:
    scope = jax.export.SymbolicScope(constraints)
    named = jax.export.symbolic_args_specs(arguments, symbolic, scope=scope)
    pairs = zip(jax.tree.leaves(arguments), jax.tree.leaves(named), strict=True)
    for own, other in pairs:
      if len(own.shape) != len(other.shape):
        raise ValueError(f"{len(other.shape)} for an array of shape {own.shape}")
    return named
  except ValueError as error:
    shapes = [leaf.shape for leaf in jax.tree.leaves(arguments)]
    raise ValueError(
      f"symbolic={symbolic!r} with constraints={tuple(constraints)} and inputs of "
      f"shapes {shapes}: expected one size, name, `_` or a final `...` for each axis "
      f"({error})"
    ) from error


def _check_sizes(
  arguments: tuple[Any, ...], named: tuple[Any, ...], symbolic: Symbolic
) -> None:
  """Raises ValueError where one name stands for several sizes of the example."""
  known: dict[str, int] = {}
  pairs = zip(jax.tree.leaves(arguments), jax.tree.leaves(named), strict=True)
  for own, other in pairs:
    for size, name in zip(own.shape, other.shape, strict=True):
      if _is_name(name) and known.setdefault(str(name), size) != size:
        raise ValueError(
          f"symbolic={symbolic!r}: {name} is {known[str(name)]} in one of "
          f"example_inputs and {size} in another; expected one size for each name"
        )


def _is_name(size: Any) -> bool:
  return jax.export.is_symbolic_dim(size) and str(size).isidentifier()
