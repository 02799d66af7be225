"""What runs where: one function for each platform that a program is made for."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")  # a pytree of arrays

_ALONE: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "platform", default=None
)


@contextlib.contextmanager
def only_for(platform: str) -> Iterator[None]:
  """Traces functions for this platform alone, such as one that JAX does not know.

  `"onnx"` has no branches by platform, and no loops whose end depends on data.
  """
  token = _ALONE.set(platform)
  try:
    yield
  finally:
    _ALONE.reset(token)


def by_platform(
  *arguments: Any, default: Callable[..., T], **functions: Callable[..., T]
) -> T:
  """`jax.lax.platform_dependent`, with a form for ONNX where there is need of one.

  Example:
    >>> with only_for("onnx"):
    ...   by_platform(3, onnx=lambda x: x + 1, default=lambda x: x)
    4
  """
  alone = _ALONE.get()
  if alone is not None:
    return functions.get(alone, default)(*arguments)
  of_jax = {name: each for name, each in functions.items() if name != "onnx"}
  if not of_jax:
    return default(*arguments)
  return jax.lax.platform_dependent(*arguments, default=default, **of_jax)
