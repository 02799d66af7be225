"""From softmax attention to doubly stochastic attention, with the weights as they are.

Where a model holds softmax attention, it gets Sinkhorn attention instead: of a trained
model that is the start of a short fine-tuning, after which it can be compiled.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from asap_jax.attention.amortized import AmortizedAttention
from asap_jax.attention.functions import (
  check_iterations,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.compiler.batches import kind_of
from asap_jax.compiler.comparing import Compared, run_of, stays_softmax, watch
from asap_jax.compiler.moved import Moved, layers_moved, outputs_moved
from asap_jax.compiler.operators import OWN, bound_arguments
from asap_jax.compiler.recorded import is_held_out
from asap_jax.compiler.refitting import Moments, affine_map, fold
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
  refit: bool = False,
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
  stay. The plans do not, and outputs may move far: heads that rest on a sink must look
  elsewhere. `refit` takes most of it back, in closed form and without labels; a short
  fine-tuning does the rest (docs/pretrained.md). Host code: it does not run under jit,
  vmap or grad; the model does.

  Args:
    model: any NNX model; left untouched.
    iterations: see `asap_jax.sinkhorn_attention`.
    start: likewise.
    amortized: for an `asap_jax.AmortizedAttention` in each place instead, which has no
      iterations and learns with the model: add `asap_jax.dual_loss(model)` to the loss.
    refit: whether the output projection of each `nnx.MultiHeadAttention` is fitted, so
      that the layer gives what softmax gave: by ridge regression on `batches`, but for
      every fifth of them, from the second on, which is measured on. It takes several
      times as many sequences as the layer has features.
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
      and valid keys; if heads are not known for `amortized`, or the projection or
      batches for `refit`; or as `asap_jax.sinkhorn_attention`.

  Example:
    >>> import asap_jax
    >>> softmax = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    >>> inputs = jax.random.normal(jax.random.key(0), (4, 6, 8))
    >>> model, report = asap_jax.to_sinkhorn(softmax, 3, "zero", batches=[inputs])
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
  for argument, given in (("names", names or ()), ("leave", leave)):
    unknown = sorted(set(given) - by_name.keys())
    if unknown:
      raise ValueError(
        f"{argument}: no softmax attention is held at {unknown}: expected some of "
        f"{list(by_name)}"
      )
  options = {
    name: _options(model, name, place, found[place])
    for name, place in by_name.items()
    if name in chosen
  }

  compared = {}
  for name, bound in options.items():
    place = by_name[name]
    function: Callable[..., jax.Array]
    if amortized:
      function = _amortized(model, place, bound)
    else:
      own: dict[str, Any] = {"iterations": iterations, "start": start}
      function = functools.partial(sinkhorn_attention, **own, **bound)
    compared[place] = Compared(name, found[place], function)
    if refit:
      _projection(model, place)
  fitted, judged = _split(list(batches), refit)
  of_fitted, of_judged = watch(model, compared, (fitted, judged), call)
  converted = nnx.clone(model)
  layers, kept = [], []
  functions = {}
  both = zip(of_fitted, of_judged, strict=True)
  for (place, each), (fit, seen) in zip(compared.items(), both, strict=True):
    if stays_softmax(each.name, seen) or stays_softmax(each.name, fit):
      kept.append(each.name)
      continue
    functions[place] = each.function
    affine = None
    if fit is not None:
      affine = _refit(_projection(converted, place), fit.moments)
    layers += layers_moved(each.name, seen, affine)
  converted = replace_held(converted, functions)
  runs = run_of(model, call), run_of(converted, call)
  report = Moved(tuple(layers), tuple(kept), *outputs_moved(runs, judged))
  return Converted(converted, report)


def _split(batches: list[Any], refit: bool) -> tuple[list[Any], list[Any]]:
  """Batches to refit on, and to measure on."""
  if not refit:
    return [], batches
  if not batches:
    raise ValueError("batches is empty: expected some for refit=True")
  if len(batches) == 1:
    return batches, batches
  sides: tuple[list[Any], list[Any]] = [], []
  for index, batch in enumerate(batches):
    sides[is_held_out(index)].append(batch)
  return sides


def _find_softmax(model: nnx.Module) -> dict[Place, Any]:
  """Softmax attention that a model holds, by its place."""
  found = {
    place: held
    for place, held in everything_held(model)
    if any(bound_arguments(held, function) is not None for function in SOFTMAX)
  }
  in_order = sorted(
    found, key=lambda place: [(isinstance(p, str), p) for p in place[0]]
  )
  return {place: found[place] for place in in_order}


def _options(model: nnx.Module, name: str, place: Place, held: Any) -> dict[str, Any]:
  """Bound arguments of a layer's softmax that Sinkhorn attention takes as well."""
  if getattr(owner_of(model, place), "decode", False):
    raise ValueError(
      f"{name}: decode=True; one-token decoding has no doubly stochastic form; "
      "expected False, or the name in leave="
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


def _amortized(
  model: nnx.Module, place: Place, options: dict[str, Any]
) -> AmortizedAttention:
  """A dual map for the heads of a layer, in the mode of its module."""
  owner = owner_of(model, place)
  heads, dim = (getattr(owner, name, None) for name in ("num_heads", "head_dim"))
  if not isinstance(heads, int) or not isinstance(dim, int):
    raise ValueError(
      f"amortized=True: {name_of(place)} is held by a {type(owner).__name__} without "
      "num_heads and head_dim, the size of its dual map; expected these attributes"
    )
  attention = AmortizedAttention(heads, dim, options)
  attention.deterministic = bool(getattr(owner, "deterministic", False))
  return attention


def _projection(model: nnx.Module, place: Place) -> nnx.LinearGeneral:
  """What follows a layer's heads."""
  owner = owner_of(model, place)
  if not isinstance(owner, nnx.MultiHeadAttention):
    raise ValueError(
      f"refit=True: {name_of(place)} is held by a {type(owner).__name__}; expected an "
      "nnx.MultiHeadAttention, whose projection is known"
    )
  return owner.out


def _refit(
  projection: nnx.LinearGeneral, moments: Moments
) -> tuple[np.ndarray, np.ndarray]:
  """Folds the map from a layer's new outputs to softmax's into what follows."""
  has_bias = projection.bias is not None
  own = functools.partial(affine_map, has_bias=has_bias)
  if moments.u.ndim == 1:
    affine = own(moments)
  else:
    stack = [jax.tree.map(lambda x, i=i: x[i], moments) for i in range(len(moments.u))]
    w, c = zip(*map(own, stack), strict=True)
    affine = np.stack(w), np.stack(c)
  fold(projection, *affine)
  return affine
