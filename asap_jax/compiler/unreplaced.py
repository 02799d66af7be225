"""Sinkhorn attention that a model calls, but holds where it cannot be replaced."""

import inspect
import itertools
import pathlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.sites import Replacement, find_held

ADVICE = (
  "let a module hold the function itself, as an attribute or in a dictionary, list or "
  "tuple, and call that: self.attention_fn = functools.partial(sinkhorn_attention, ...)"
)
# Packages whose frames lie between a model's own line and the attention function.
_BETWEEN = (
  "asap_jax",
  "beartype",
  "contextlib",
  "flax",
  "functools",
  "jax",
  "jaxtyping",
)
_count = itertools.count()


class Unreplaced:
  """Hears calls of `sinkhorn_attention` at no known site, and names them.

  Attributes:
    names: of the calls, each once: the module's path where it is known, the function
      with its file and line, and the iterations.
  """

  def __init__(self) -> None:
    self._names: dict[str, None] = {}

  @property
  def names(self) -> tuple[str, ...]:
    """See the class."""
    return tuple(self._names)

  def __call__(self, running: nnx.Module, name: str, given: dict[str, Any]) -> None:
    """Takes note of one call in the running model."""
    # Half an iteration is one softmax: there is nothing to save.
    if name == sinkhorn_attention.__name__ and given["iterations"] > 0:
      path, place = _place(running)
      self._names[f"{path}{place}, {given['iterations']} iterations"] = None


def shapes_with_every_call_heard(function: Callable[[Any], Any], batch: Any) -> Any:
  """`jax.eval_shape` that traces all functions afresh, jitted ones inside too.

  JAX takes a jitted function that it has seen from its cache, and its calls would not
  be heard. Metadata that is new each time makes it another function to the cache.
  """
  with set_xla_metadata(asap_jax_heard=str(next(_count))):
    return jax.eval_shape(function, batch)


def nothing_found(model: nnx.Module, unreplaced: tuple[str, ...]) -> str:
  """Why there is nothing to compile in a model, which calls what is named."""
  kinds = AsapAttention, CandidateAttention, Replacement
  if any(find_held(model, kind) for kind in kinds):
    return "model holds no Sinkhorn attention, for it is compiled already"
  if unreplaced:
    return (
      "model holds no Sinkhorn attention that can be replaced, but calls it in "
      f"{'; '.join(unreplaced)}: {ADVICE}"
    )
  return (
    "model holds no Sinkhorn attention, and calls none on the first batch: expected a "
    "module with an attribute that is sinkhorn_attention or "
    "functools.partial(sinkhorn_attention, ...); asap_jax.to_sinkhorn makes one of a "
    "model with softmax attention"
  )


def _place(running: nnx.Module) -> tuple[str, str]:
  """Path of the module that calls, as a prefix, and its function with file and line."""
  paths = {id(m): ".".join(map(str, path)) for path, m in nnx.iter_modules(running)}
  own = None
  for frame in _frames():
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if own is None and package not in _BETWEEN:
      file = pathlib.Path(frame.f_code.co_filename).name
      own = f"{frame.f_code.co_qualname} ({file}, line {frame.f_lineno})"
    path = paths.get(id(frame.f_locals.get("self")))
    if path is not None:
      return f"{path}: " if path else "", own or type(frame.f_locals["self"]).__name__
  # Inside a transformation of NNX the modules are others than those of the model.
  return "", own or "a call"


def _frames() -> Iterator[FrameType]:
  frame = inspect.currentframe()
  while frame is not None:
    yield frame
    frame = frame.f_back
