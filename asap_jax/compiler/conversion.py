"""From softmax attention to doubly stochastic attention, with the weights as they are.

Where a model holds softmax attention, it gets Sinkhorn attention instead: of a trained
model that is the start of a short fine-tuning, after which it can be compiled.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
from flax import nnx

from asap_jax.attention.amortized import AmortizedAttention
from asap_jax.attention.functions import (
  check_iterations,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.compiler.batches import kind_of
from asap_jax.compiler.moved import Compared, Moved, how_far
from asap_jax.compiler.operators import OWN, bound_arguments
from asap_jax.compiler.sites import (
  Place,
  everything_held,
  name_of,
  owner_of,
  replace_held,
)
from asap_jax.teacher.starts import Start

# Functions that are softmax attention, with the arguments of Flax's layers.
SOFTMAX: tuple[Callable[..., jax.Array], ...] = (
  softmax_attention,
  nnx.dot_product_attention,
  jax.nn.dot_product_attention,
)
# Bound arguments that mean the same to Sinkhorn attention.
_KEPT = set(inspect.signature(sinkhorn_attention).parameters) - {*OWN, "is_causal"}
# Those that say how, not what.
_DROPPED = ("implementation", "promote_dtype")


class Converted(NamedTuple):
  """Result of `to_sinkhorn`.

  Attributes:
    model: a copy with doubly stochastic attention.
    report: how far that moved it.
  """

  model: nnx.Module
  report: Moved


def to_sinkhorn(
  model: nnx.Module,
  iterations: int = 2,
  start: Start = "gaussian",
  *,
  amortized: bool = False,
  names: Collection[str] | None = None,
  leave: Collection[str] = (),
  batches: Iterable[Any] = (),
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
) -> Converted:
  """Turns the softmax attention of a model into doubly stochastic attention.

  Softmax attention is `nnx.dot_product_attention`, which is what
  `nnx.MultiHeadAttention` holds by default, `jax.nn.dot_product_attention` or
  `asap_jax.softmax_attention`, or a partial of one of them, in an attribute of a module
  or in a dictionary, list or tuple there. Weights, masks, biases, dropout and scale
  stay. The plans do not, and outputs may move far: fine-tune afterwards, or follow the
  softmax model's outputs first (`asap_jax.distil` with `wrt`); docs/pretrained.md has
  the road. Host code: it does not run under jit, vmap or grad; the model does.

  Args:
    model: any NNX model; left untouched.
    iterations: see `asap_jax.sinkhorn_attention`.
    start: likewise.
    amortized: for an `asap_jax.AmortizedAttention` in each place instead, which has no
      iterations and learns with the model: add `asap_jax.dual_loss(model)` to the loss.
    names: of the layers to convert, by path as in the report; all by default. For one
      after the other, convert what an earlier call returned.
    leave: names of layers that stay softmax, such as one of which a single token, CLS,
      is read.
    batches: unlabelled inputs to measure on, in evaluation mode; without them the
      report has names alone. Layers with one query stay softmax where they are seen: a
      doubly stochastic plan of one row is uniform.
    call: how a batch is given to the model.

  Returns:
    `Converted`: the model, in the mode of `model`, and the report.

  Raises:
    ValueError: if the model holds no softmax attention, a name is unknown, a layer is
      causal or decodes token by token, binds an argument that Sinkhorn attention does
      not have, or has on a batch a mask that is not the outer product of valid queries
      and valid keys; if heads are not known for `amortized`; or as
      `asap_jax.sinkhorn_attention`.

  Example:
    >>> import asap_jax
    >>> softmax = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    >>> inputs = jax.random.normal(jax.random.key(0), (4, 6, 8))
    >>> model, report = asap_jax.to_sinkhorn(softmax, batches=[inputs])
    >>> model(inputs).shape, [layer.name for layer in report.layers]
    ((4, 6, 8), ['attention_fn'])
  """
  check_iterations(iterations, start)
  if not isinstance(model, nnx.Module):
    raise ValueError(f"model is of {kind_of(model)}: expected a Flax NNX module")
  found = _find_softmax(model)
  if not found:
    known = "nnx.dot_product_attention, jax.nn.dot_product_attention"
    raise ValueError(
      f"model holds no softmax attention: expected a module with an attribute that is "
      f"{known} or asap_jax.softmax_attention, or a partial of them"
    )
  by_name = {name_of(place): place for place in found}
  chosen = set(by_name if names is None else names) - set(leave)
  unknown = sorted({*(names or ()), *leave} - by_name.keys())
  if unknown:
    raise ValueError(
      f"no softmax attention is held at {unknown}: expected some of {list(by_name)}"
    )
  options = {
    name: _options(model, name, place, found[place])
    for name, place in by_name.items()
    if name in chosen
  }

  if amortized:
    heads = {name: _heads(model, by_name[name]) for name in options}
    functions: dict[str, Callable[..., jax.Array]] = {
      name: AmortizedAttention(*heads[name], bound) for name, bound in options.items()
    }
  else:
    own: dict[str, Any] = {"iterations": iterations, "start": start}
    functions = {
      name: functools.partial(sinkhorn_attention, **own, **bound)
      for name, bound in options.items()
    }

  def convert(names: Collection[str]) -> nnx.Module:
    return replace_held(model, {by_name[name]: functions[name] for name in names})

  compared = {
    by_name[name]: Compared(name, found[by_name[name]], functions[name])
    for name in functions
  }
  report = how_far(model, compared, convert, batches, call)
  return Converted(convert([layer.name for layer in report.layers]), report)


def _find_softmax(model: nnx.Module) -> dict[Place, Any]:
  """Softmax attention that a model holds, by its place."""
  found = {
    place: held
    for place, held in everything_held(model)
    if any(bound_arguments(held, function) is not None for function in SOFTMAX)
  }
  in_order = sorted(found, key=lambda place: [(isinstance(p, str), p) for p in place[0]])
  return {place: found[place] for place in in_order}


def _options(model: nnx.Module, name: str, place: Place, held: Any) -> dict[str, Any]:
  """Bound arguments of a layer's softmax that Sinkhorn attention takes as well."""
  if getattr(owner_of(model, place), "decode", False):
    raise ValueError(
      f"{name}: decode=True; one-token decoding has no doubly stochastic form; expected "
      "False, or the name in leave="
    )
  every = (bound_arguments(held, function) for function in SOFTMAX)
  bound = next(each for each in every if each is not None)
  bound = {
    key: value
    for key, value in bound.items()
    if key not in _DROPPED and value is not None and value is not False
  }
  if bound.pop("is_causal", False):
    raise ValueError(
      f"{name}: is_causal=True; a causal doubly stochastic plan is the identity; "
      "expected False, or the name in leave="
    )
  unknown = sorted(bound.keys() - _KEPT)
  if unknown:
    raise ValueError(
      f"{name}: binds {', '.join(unknown)}, which Sinkhorn attention does not have; "
      f"expected some of {', '.join(sorted(_KEPT))}, or the name in leave="
    )
  return bound


def _heads(model: nnx.Module, place: Place) -> tuple[int, int]:
  """Heads of a layer, and their dimension."""
  owner = owner_of(model, place)
  heads, dim = (getattr(owner, name, None) for name in ("num_heads", "head_dim"))
  if not isinstance(heads, int) or not isinstance(dim, int):
    raise ValueError(
      f"amortized=True: {name_of(place)} is held by a {type(owner).__name__} without "
      "num_heads and head_dim, the size of its dual map; expected these attributes"
    )
  return heads, dim
