"""Finding Sinkhorn attention in an NNX model, recording it, replacing it."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.inputs import Activation, Inputs
from asap_jax.attention.signature import inputs_of
from asap_jax.compiler.operators import Sinkhorn, bound_arguments, sinkhorn_of

Place = tuple[tuple[str | int, ...], str]  # path of a module, and its attribute
Held = TypeVar("Held")

_SIGNATURE = inspect.signature(sinkhorn_attention)


class Replacement(functools.partial):
  """An attention function that was put in the place of a teacher's.

  Exact iterations that were chosen look like those of a model that was never compiled
  but for this.
  """


class Site(NamedTuple):
  """A Sinkhorn attention function held by a module of a model.

  Attributes:
    path: of the module in the model.
    attribute: of the module that holds the function.
    function: what it holds: `sinkhorn_attention` or a partial of it.
    teacher: the operator of its own bound arguments.
    options: its other bound arguments, such as `epsilon`.
  """

  path: tuple[str | int, ...]
  attribute: str
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
    attribute = () if self.attribute == "attention_fn" else (self.attribute,)
    return ".".join(map(str, (*self.path, *attribute))) or self.attribute


class _Calls(nnx.Variable):
  """Activations of the calls of one forward pass."""


class _Recorder(nnx.Module):
  """Calls an attention function and keeps what it saw."""

  calls: _Calls

  def __init__(self, function: Callable[..., jax.Array], options: dict[str, Any]):
    self.function = function
    self.options = tuple(options.items())

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    call = _SIGNATURE.bind(*args, **(dict(self.options) | kwargs))
    call.apply_defaults()
    inputs = inputs_of(call.arguments)
    earlier = self.calls.get_value() if hasattr(self, "calls") else ()
    self.calls = _Calls((*earlier, _flatten_batch(inputs)))
    return self.function(*args, **kwargs)


def find_sinkhorn(model: nnx.Module) -> list[Site]:
  """All attributes, at any depth, that are `sinkhorn_attention` or a partial of it.

  Half an iteration (`iterations=0`) is one softmax, and is left out.

  A module that occurs several times in the model is listed once, where it is met first.
  """
  sites = []
  for path, module in nnx.iter_modules(model):
    for attribute, held in vars(module).items():
      bound = bound_arguments(held, sinkhorn_attention)
      if bound is None:
        continue
      teacher = sinkhorn_of(bound)
      where: tuple[Any, ...] = tuple(path)
      # Without an iteration there is nothing to save.
      if teacher.iterations > 0:
        sites.append(Site(where, attribute, held, teacher, bound))
  return sorted(sites, key=lambda site: [(isinstance(p, str), p) for p in site.path])


def find_held(model: nnx.Module, kind: type[Held]) -> dict[Place, Held]:
  """All attributes of a kind, at any depth, by path of the module and attribute."""
  found = {}
  for path, module in nnx.iter_modules(model):
    where: tuple[Any, ...] = tuple(path)
    for attribute, held in vars(module).items():
      if isinstance(held, kind):
        found[where, attribute] = held
  return found


def held_at(model: nnx.Module, site: Site) -> Any:
  """What a model, compiled or not, holds at a site of its teacher."""
  modules = {tuple(path): module for path, module in nnx.iter_modules(model)}
  return getattr(modules[site.path], site.attribute)


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
  """The same by paths of modules and attributes."""
  copy = nnx.clone(model)
  modules = {tuple(path): module for path, module in nnx.iter_modules(copy)}
  for (path, attribute), function in functions.items():
    # What is there may be of the other kind, and an attribute keeps its kind.
    kind = nnx.data if isinstance(function, nnx.Module) else nnx.static
    held = kind(function)
    setattr(modules[path], attribute, held)
  return copy


def recorder(
  model: nnx.Module,
  sites: Sequence[Site],
  call: Callable[[nnx.Module, Any], Any],
) -> Callable[[Any], list[tuple[Activation, ...]]]:
  """A jitted function of a batch: the activations at each site, one per call of it.

  The model runs as it stands, in evaluation mode (no dropout); it is not changed.
  """
  listening = replace_sites(
    # The plan is the same in the scaling domain, and the forward pass faster.
    model,
    sites,
    [
      _Recorder(functools.partial(site.function, implementation="xla"), site.options)
      for site in sites
    ],
  )
  listening.eval()
  graph, state = nnx.split(listening)

  @jax.jit
  def record(state, batch):
    running = nnx.merge(graph, state)
    call(running, batch)
    listeners = [held_at(running, site) for site in sites]
    return [
      listener.calls.get_value() if hasattr(listener, "calls") else ()
      for listener in listeners
    ]

  return functools.partial(record, state)


def _flatten_batch(inputs: Inputs) -> Activation:
  batch = inputs.query.shape[:-3]

  def flatten(array: jax.Array, *inner: int) -> jax.Array:
    return jnp.broadcast_to(array, (*batch, *inner)).reshape(-1, *inner)

  def flatten_mask(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else flatten(mask, *mask.shape[-2:])

  shape = (*inputs.query.shape[-3:-1], inputs.key.shape[-2])
  return Activation(
    query=flatten(inputs.query, *inputs.query.shape[-3:]),
    key=flatten(inputs.key, *inputs.key.shape[-3:]),
    bias=None if inputs.bias is None else flatten(inputs.bias, *shape),
    query_mask=flatten_mask(inputs.query_mask),
    key_mask=flatten_mask(inputs.key_mask),
    is_product=None if inputs.is_product is None else inputs.is_product.all(),
  )
