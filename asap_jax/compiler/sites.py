"""Finding Sinkhorn attention in an NNX model, and replacing it.

A model may hold an attention function as an attribute of a module or of its class, bare
or in dictionaries, lists and tuples, and under `jax.jit`.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.compiler.operators import Sinkhorn, bound_arguments, sinkhorn_of

# Path of a module, or of a container that a module holds, and attribute or key there.
Place = tuple[tuple[str | int, ...], str | int]
Held = TypeVar("Held")


class Replacement(functools.partial):
  """An attention function that was put in the place of a teacher's.

  Exact iterations that were chosen look like those of a model that was never compiled
  but for this.
  """


class Site(NamedTuple):
  """A Sinkhorn attention function held by a module of a model.

  Attributes:
    path: of the module in the model, or of a container in the module.
    attribute: of the module, or key of the container, that holds the function.
    function: what it holds: `sinkhorn_attention` or a partial of it, under `jax.jit` or
      not.
    teacher: the operator of its own bound arguments.
    options: its other bound arguments, such as `epsilon`.
  """

  path: tuple[str | int, ...]
  attribute: str | int
  function: Callable[..., jax.Array]
  teacher: Sinkhorn
  options: dict[str, Any]

  @property
  def iterations(self) -> int:
    """Full iterations of the teacher."""
    return self.teacher.iterations

  @property
  def name(self) -> str:
    """Path, and attribute unless it is Flax's `attention_fn`, in one word."""
    return name_of((self.path, self.attribute))


def check_is_nnx(model: Any) -> None:
  """Raises ValueError unless a model is a Flax NNX module."""
  if not isinstance(model, nnx.Module):
    kind = type(model)
    raise ValueError(
      f"model is a {kind.__module__}.{kind.__qualname__}: expected a Flax NNX module"
    )


def name_of(place: Place) -> str:
  """Name of the layer at a place, as in reports."""
  path, attribute = place
  own = () if attribute == "attention_fn" else (attribute,)
  return ".".join(map(str, (*path, *own))) or str(attribute)


def find_sinkhorn(model: nnx.Module) -> list[Site]:
  """All Sinkhorn attention functions that a model holds, at any depth.

  Half an iteration (`iterations=0`) is one softmax, and is left out.

  A module that occurs several times in the model is listed once, where it is met first.
  """
  sites = []
  for (path, attribute), held in everything_held(model):
    bound = bound_arguments(held, sinkhorn_attention)
    if bound is None:
      continue
    teacher = sinkhorn_of(bound)
    # Without an iteration there is nothing to save.
    if teacher.iterations > 0:
      sites.append(Site(path, attribute, held, teacher, bound))
  return sorted(sites, key=lambda site: [(isinstance(p, str), p) for p in site.path])


def find_held(model: nnx.Module, kind: type[Held]) -> dict[Place, Held]:
  """Everything of a kind that a model holds, at any depth, by its place."""
  return {
    place: held for place, held in everything_held(model) if isinstance(held, kind)
  }


def held_at(model: nnx.Module, site: Site) -> Any:
  """What a model, compiled or not, holds at a site of its teacher."""
  return held_in(model, (site.path, site.attribute))


def held_in(model: nnx.Module, place: Place) -> Any:
  """The same by place."""
  module, (attribute, *keys) = _owner(_modules(model), place)
  held = getattr(module, str(attribute))
  for key in keys:
    held = held[key]
  return held


def replace_sites(
  model: nnx.Module,
  sites: Sequence[Site],
  functions: Sequence[Callable[..., jax.Array]],
) -> nnx.Module:
  """A copy of `model` with other functions at its sites; the original is untouched."""
  places = [(site.path, site.attribute) for site in sites]
  return replace_held(model, dict(zip(places, functions, strict=True)))


def replace_held(
  model: nnx.Module, functions: Mapping[Place, Callable[..., jax.Array]]
) -> nnx.Module:
  """The same by places."""
  copied = nnx.clone(model)
  modules = _modules(copied)
  for place, function in functions.items():
    module, (attribute, *keys) = _owner(modules, place)
    # What is there may be of the other kind, and an attribute keeps its kind.
    kind = nnx.data if keys or isinstance(function, nnx.Module) else nnx.static
    held = _with(getattr(module, str(attribute)), keys, function) if keys else function
    setattr(module, str(attribute), kind(held))
  return copied


def _modules(model: nnx.Module) -> dict[tuple[str | int, ...], nnx.Module]:
  modules = {}
  for path, module in nnx.iter_modules(model):
    where: tuple[Any, ...] = tuple(path)
    modules[where] = module
  return modules


def owner_of(model: nnx.Module, place: Place) -> nnx.Module:
  """The module that holds a place, itself or in a container."""
  return _owner(_modules(model), place)[0]


def everything_held(model: nnx.Module) -> Iterator[tuple[Place, Any]]:
  """Attributes of all modules and entries of containers in them, but no modules."""
  for path, module in _modules(model).items():
    for attribute, held in _attributes(module).items():
      yield from _within(path, attribute, held)


def _attributes(module: nnx.Module) -> dict[str, Any]:
  """A module's own, and those of its class that are no methods."""
  of_class: dict[str, Any] = {}
  for base in reversed(type(module).__mro__):
    of_class |= vars(base)
  found = {
    name: held.__func__ if isinstance(held, staticmethod) else held
    for name, held in of_class.items()
    # A plain function is a method, and is called with the module.
    if isinstance(held, staticmethod | functools.partial | dict | list | tuple)
    and not name.startswith("__")
  }
  # Flax keeps its own books there.
  return found | {k: v for k, v in vars(module).items() if not k.startswith("_pytree_")}


def _within(
  path: tuple[str | int, ...], attribute: str | int, held: Any
) -> Iterator[tuple[Place, Any]]:
  yield (path, attribute), held
  items: Any = ()
  if isinstance(held, dict):
    items = held.items()
  elif isinstance(held, list | tuple):
    items = enumerate(held)
  for key, inner in items:
    if isinstance(key, str | int):
      yield from _within((*path, attribute), key, inner)


def _owner(
  modules: Mapping[tuple[str | int, ...], nnx.Module], place: Place
) -> tuple[nnx.Module, tuple[str | int, ...]]:
  """The module that holds a place, and the attribute and keys that lead on from it."""
  path, attribute = place
  keys: tuple[str | int, ...] = (attribute,)
  while path not in modules:
    *above, last = path
    path, keys = tuple(above), (last, *keys)
  return modules[path], keys


def _with(container: Any, keys: Sequence[str | int], value: Any) -> Any:
  """A copy of nested containers with another value at one place."""
  if not keys:
    return value
  key, *inner = keys
  if isinstance(container, tuple):
    items = list(container)
    items[int(key)] = _with(items[int(key)], inner, value)
    # A named tuple takes its fields one by one.
    return container._make(items) if hasattr(container, "_make") else tuple(items)
  copied = copy.copy(container)
  copied[key] = _with(container[key], inner, value)
  return copied
