"""What a model is to those who serve it: a function of arrays, in evaluation mode."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

Call = Callable[..., Any]


def arguments_of(example_inputs: Any) -> tuple[Any, ...]:
  """The arguments of a call: those of a tuple, or the one that was given."""
  return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def described(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
  """Shapes and dtypes of arguments.

  Raises:
    ValueError: where one is no array.
  """

  def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      place = jax.tree_util.keystr(path)
      raise ValueError(
        f"example_inputs{place} is a {type(leaf).__name__}: expected arrays, or "
        "jax.ShapeDtypeStruct; what else a call needs is bound by `call`"
      )
    # As JAX takes it: 64 bits are 32 by default.
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

  return jax.tree_util.tree_map_with_path(one, arguments)


def function_of(
  model: Any, call: Call | None, *, as_numpy: bool = False
) -> Callable[..., Any]:
  """A model's forward pass in evaluation mode; a function is what it is.

  The model's arrays become constants of the function, on no device in particular;
  `as_numpy` leaves them NumPy's, so that what is made of them alone is no operation.

  Raises:
    ValueError: if `model` cannot be called.
  """
  if isinstance(model, nn.Module):
    raise ValueError(
      f"model is the Linen module {type(model).__name__}, without its variables: "
      "expected an NNX module or a function, such as functools.partial(module.apply, "
      "variables)"
    )
  if not isinstance(model, nnx.Module):
    if not callable(model):
      raise ValueError(
        f"model is a {type(model).__name__}: expected an NNX module or a function"
      )
    if call is None:
      return model
    return lambda *arguments: call(model, *arguments)
  evaluated = nnx.clone(model)
  evaluated.eval()
  for _, module in nnx.iter_modules(evaluated):
    if as_numpy and type(module) is nnx.Dropout:
      module.__class__ = _Kept
  graph, state = nnx.split(evaluated)
  state = jax.tree.map(_on_host, state)

  def run(*arguments: Any) -> Any:
    own = state if as_numpy else jax.tree.map(jnp.asarray, state)
    merged: Any = nnx.merge(graph, own)
    return merged(*arguments) if call is None else call(merged, *arguments)

  return run


class _Kept(nnx.Dropout):
  """Dropout in evaluation mode; jax2onnx takes fewer arguments than Flax does."""

  def __call__(self, inputs: Any, *_: Any, **__: Any) -> Any:
    return inputs


def _on_host(array: Any) -> Any:
  is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
  return array if is_key else np.asarray(array)
