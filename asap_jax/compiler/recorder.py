"""Recording what the Sinkhorn attentions of a model see in one forward pass."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.inputs import Activation, Inputs
from asap_jax.attention.signature import inputs_of, listening
from asap_jax.c_transform.segments import Segments
from asap_jax.compiler.batches import check_batch, check_runs
from asap_jax.compiler.operators import OWN
from asap_jax.compiler.recorded import Calls
from asap_jax.compiler.sites import Site, held_at, replace_sites
from asap_jax.compiler.unreplaced import shapes_with_every_call_heard

# Told of the running model, and of the name and the arguments of an attention call.
Hear = Callable[[nnx.Module, str, dict[str, Any]], None]

_SIGNATURE = inspect.signature(sinkhorn_attention)


class _Refused(ValueError):
  """A call that no other operator could answer."""


class _Calls(nnx.Variable):
  """Activations of the calls of one forward pass."""


class _Recorder(nnx.Module):
  """Calls an attention function and keeps what it saw."""

  calls: _Calls

  def __init__(self, site: Site):
    self.name = site.name
    # The plan is the same in the scaling domain, and the forward pass faster.
    own = {name: getattr(site.teacher, name) for name in OWN}
    function = functools.partial(sinkhorn_attention, **own, **site.options)
    self.function = functools.partial(function, implementation="xla")

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    given = ", ".join(f"{name}={kwargs[name]!r}" for name in OWN if name in kwargs)
    if given:
      raise _Refused(
        f"{self.name}: its call passes {given}, which no other operator takes; bind it "
        f"to what the model holds: functools.partial(sinkhorn_attention, {given})"
      )
    call = _SIGNATURE.bind(*args, **(self.function.keywords | kwargs))
    call.apply_defaults()
    inputs = inputs_of(call.arguments)
    earlier = self.calls.get_value() if hasattr(self, "calls") else ()
    self.calls = _Calls((*earlier, flatten_batch(inputs)))
    with listening(None):
      return self.function(*args, **kwargs)


def _unheard(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A function whose attention calls are told to nobody."""

  def run(*args: Any, **kwargs: Any) -> jax.Array:
    with listening(None):
      return function(*args, **kwargs)

  return run


def recorder(
  model: nnx.Module,
  sites: Sequence[Site],
  call: Callable[[nnx.Module, Any], Any],
  hear: Hear | None = None,
  left: Sequence[Site] = (),
) -> Callable[[Any], Calls]:
  """A jitted function of a batch: the activations at each site, one per call of it.

  The model runs as it stands, in evaluation mode (no dropout); it is not changed.
  `hear` is told of every attention call elsewhere while the function is traced, but
  not of those at sites that are left out.
  """
  functions = [_Recorder(site) for site in sites]
  silent = [_unheard(site.function) for site in left]
  listening_model = replace_sites(model, [*sites, *left], [*functions, *silent])
  listening_model.eval()
  graph, state = nnx.split(listening_model)

  @jax.jit
  def record(state, batch):
    running = nnx.merge(graph, state)
    with listening(None if hear is None else functools.partial(hear, running)):
      call(running, batch)
    listeners = [held_at(running, site) for site in sites]
    return [
      listener.calls.get_value() if hasattr(listener, "calls") else ()
      for listener in listeners
    ]

  return lambda batch: without_explicit_axes(record(state, batch))


def without_explicit_axes(calls: Calls) -> Calls:
  """Activations on one device where the axes of a mesh are explicit.

  What is made of them says nothing of shardings, which such axes ask for.
  """

  def moved(array: Any) -> Any:
    explicit = AxisType.Explicit in jax.typeof(array).sharding.mesh.axis_types
    if not explicit or isinstance(array, jax.core.Tracer):
      return array
    return jnp.asarray(np.asarray(array))

  return jax.tree.map(moved, calls)


def shapes_seen(
  record: Callable[[Any], Calls],
  model: nnx.Module,
  batch: Any,
  call: Callable[[nnx.Module, Any], Any],
) -> Calls:
  """What `record` would give of a batch, as shapes; every call elsewhere is heard.

  Raises:
    ValueError: if the batch is none, the model does not take it, or its attention
      cannot be observed.
  """
  check_batch(batch)
  try:
    return shapes_with_every_call_heard(record, batch)
  except _Refused as error:
    raise ValueError(str(error)) from error
  # A model may raise anything, and so may a transformation around a layer.
  except Exception as error:
    plain = nnx.clone(model)
    plain.eval()
    graph, state = nnx.split(plain)
    check_runs(lambda state, batch: call(nnx.merge(graph, state), batch), state, batch)
    raise ValueError(
      "the model could not be run with its Sinkhorn attention under observation: "
      f"{error}. The attention sits in a transformation that shares it, such as "
      "jax.vmap or jax.checkpoint, or nnx.vmap with its axis None; nnx.jit, nnx.remat "
      "and nnx.scan over stacked layers can be compiled, and attention takes batch "
      "axes without vmap"
    ) from error


def flatten_batch(inputs: Inputs) -> Activation:
  """What a call saw, its batch axes as one."""
  batch = inputs.query.shape[:-3]

  def flatten(array: jax.Array, *inner: int) -> jax.Array:
    return jnp.broadcast_to(array, (*batch, *inner)).reshape(-1, *inner)

  def flatten_mask(mask: jax.Array | None) -> jax.Array | None:
    return None if mask is None else flatten(mask, *mask.shape[-2:])

  shape = (*inputs.query.shape[-3:-1], inputs.key.shape[-2])
  bias = inputs.bias_of_pairs
  segments = inputs.segments
  if segments is not None:
    segments = Segments(*(flatten(ids, *ids.shape[-2:]) for ids in segments))
  return Activation(
    query=flatten(inputs.query, *inputs.query.shape[-3:]),
    key=flatten(inputs.key, *inputs.key.shape[-3:]),
    bias=None if bias is None else flatten(bias, *shape),
    query_mask=flatten_mask(inputs.query_mask),
    key_mask=flatten_mask(inputs.key_mask),
    is_product=None if inputs.is_product is None else inputs.is_product.all(),
    segments=segments,
    max_segments=inputs.max_segments,
  )
