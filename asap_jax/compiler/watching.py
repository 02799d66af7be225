"""Watching a compiled model: column errors of live batches against calibration's."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.layers import AsapAttention
from asap_jax.attention.watched import Moments, WatchedAttention
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.operators import bound_arguments
from asap_jax.compiler.records import compiled_places
from asap_jax.compiler.sites import (
  Place,
  check_is_nnx,
  find_held,
  name_of,
  replace_held,
)

# What the watches at some places know: mean and deviation of the squares, and a margin.
Watches = dict[Place, tuple[tuple[Array, Array], float]]


class Reading(NamedTuple):
  """What one layer showed on a call: a pytree, with one number for each head.

  Attributes:
    column_error: root mean square over the batch of
      `asap_jax.metrics.column_error_of_means`.
    threshold: what calibration lets expect of a batch of this size at most.
  """

  column_error: Float[Array, "*layers heads"]
  threshold: Float[Array, "*layers heads"]

  @property
  def alarm(self) -> Bool[Array, "*layers heads"]:
    """Heads whose error is above the threshold, or not a number."""
    return ~(self.column_error <= self.threshold)


def monitor(
  model: nnx.Module,
  batches: Iterable[Any],
  *,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  margin: float = 1.25,
) -> nnx.Module:
  """Puts a watch on every doubly stochastic attention of a model.

  The watched model computes what the model did. `asap_jax.watch` shows beside it how
  far the columns of each head are from exact, and whether that is more than on the
  batches given here. `asap_jax.compile(..., monitor=True)` does so with the batches
  that it held out. Host code: it does not run under jit, vmap or grad; the watched
  model does.

  A threshold is `margin` times the root of what the mean square over the batch is
  expected to be, and four standard deviations more: a smaller batch may be farther off.

  Args:
    model: compiled, or with Sinkhorn attention of its own; left untouched.
    batches: unlabelled inputs that nothing was fitted to, of the kind and lengths that
      are usual; some hundred sequences do.
    call: how a batch is given to the model.
    margin: at least one; less is missed and more is false.

  Returns:
    The watched model, which `asap_jax.save` keeps with its thresholds.

  Raises:
    ValueError: if the model holds no such attention, is watched already, or never calls
      one that it holds; if there is no batch; or if `margin` is below one.

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=1,
    ...   rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (3, 16, 6, 8))
    >>> watched = monitor(layer, batches)
    >>> out, readings = watch(watched, batches[0])
    >>> readings["attention_fn"].alarm.tolist()
    [False, False]
  """
  if not margin >= 1.0:
    raise ValueError(f"margin={margin}: expected a number of at least one")
  check_is_nnx(model)
  if find_held(model, WatchedAttention):
    raise ValueError("model is watched already: expected one that is not")
  held = doubly_stochastic(model)
  if not held:
    raise ValueError(
      "model holds no doubly stochastic attention: expected a compiled model, or one "
      "with asap_jax.sinkhorn_attention"
    )
  bare = {place: WatchedAttention(fn, _bound(fn)) for place, fn in held.items()}
  seen = _moments(replace_held(model, bare), batches, call)
  unseen = [name for name in map(name_of, held) if name not in seen]
  if unseen:
    raise ValueError(
      f"{', '.join(unseen)}: no call of this attention was seen; pass call=, or "
      "batches that reach it"
    )
  return watched_as(
    model, {place: (_usual(seen[name_of(place)]), margin) for place in held}
  )


def watch(
  model: nnx.Module,
  *args: Any,
  call: Callable[..., Any] = lambda model, *args: model(*args),
) -> tuple[Any, dict[str, Reading]]:
  """Runs a watched model, and tells what each layer showed.

  A pure function of model and inputs, which works under jit and vmap: nothing is
  written into the model.

  Args:
    model: of `asap_jax.monitor`, or loaded.
    *args: for the model.
    call: how they are given to it.

  Returns:
    What the model returns, and a `Reading` of each layer by its name. If a layer is
    called several times, the largest error for its threshold counts.

  Raises:
    ValueError: if the model is not watched.

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=1,
    ...   rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (1, 16, 6, 8))
    >>> _, readings = watch(monitor(layer, batches), batches[0])
    >>> list(readings)
    ['attention_fn']
  """
  check_is_nnx(model)
  if not find_held(model, WatchedAttention):
    raise ValueError("model is not watched: expected asap_jax.monitor's")
  out, shown = _captured(model, args, call)
  return out, {
    name: functools.reduce(
      _worse, map(Reading, entry["column_error"], entry["threshold"])
    )
    for name, entry in shown.items()
  }


def _worse(one: Reading, other: Reading) -> Reading:
  """Of each head that which is farther above its threshold, or not a number."""
  left, right = (each.column_error / each.threshold for each in (one, other))
  is_one = ~(left <= right)
  return jax.tree.map(functools.partial(jnp.where, is_one), one, other)


def watched_as(model: nnx.Module, usual: Watches) -> nnx.Module:
  """A copy of `model` with watches of known thresholds at some places."""
  held = doubly_stochastic(model)
  return replace_held(
    model,
    {
      place: WatchedAttention(held[place], _bound(held[place]), *known)
      for place, known in usual.items()
    },
  )


def unwatched(
  model: nnx.Module,
) -> tuple[nnx.Module, Watches]:
  """A copy of a model without its watches, and what they know.

  Args:
    model: watched or not; left untouched.

  Returns:
    The bare model; and of each place where there was a watch, the path and the
    attribute that held it, the mean and the deviation of the squares that calibration
    saw, and the margin.

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=1,
    ...   rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (1, 16, 6, 8))
    >>> bare, known = unwatched(monitor(layer, batches))
    >>> list(known)
    [((), 'attention_fn')]
  """
  watches = find_held(model, WatchedAttention)
  bare = replace_held(
    model, {place: watch.attention_fn for place, watch in watches.items()}
  )
  return bare, {
    place: ((watch.mean[...], watch.deviation[...]), watch.margin)
    for place, watch in watches.items()
  }


def doubly_stochastic(model: nnx.Module) -> dict[Place, Callable[..., jax.Array]]:
  """Attention functions whose columns are to be exact, by their places."""
  found: dict[Place, Any] = compiled_places(model)
  inside = [(*path, attribute) for path, attribute in found]
  for (path, attribute), held in find_held(model, object).items():
    is_inside = any(path[: len(above)] == above for above in inside)
    if not is_inside and bound_arguments(held, sinkhorn_attention) is not None:
      found[path, attribute] = held
  return found


def _bound(function: Any) -> dict[str, Any]:
  """Arguments that are bound to an attention function."""
  if isinstance(function, AsapAttention):
    return function.bound
  if isinstance(function, CandidateAttention):
    return dict(function.options)
  return bound_arguments(function, sinkhorn_attention) or {}


def _moments(
  model: nnx.Module, batches: Iterable[Any], call: Callable[..., Any]
) -> dict[str, Moments]:
  """Sums over all sequences of the batches, by the names of the layers."""
  model.eval()
  graph, state = nnx.split(model)

  @jax.jit
  def sums(state, batch):
    _, shown = _captured(nnx.merge(graph, state), (batch,), call)
    return {
      name: _added([_sums_of(each) for each in entry["moments"]])
      for name, entry in shown.items()
    }

  found = [sums(state, batch) for batch in batches]
  if not found:
    raise ValueError("batches is empty: expected at least one batch")
  return _added(found)


def _captured(
  model: nnx.Module, args: tuple[Any, ...], call: Callable[..., Any]
) -> tuple[Any, dict[str, dict[str, Any]]]:
  """What a model returns, and what its watches sow, by the names of the layers."""
  watches = find_held(model, WatchedAttention)
  places = {(*path, attribute): (path, attribute) for path, attribute in watches}
  # Captured values are written into the modules meanwhile.
  out, sown = nnx.capture(call, nnx.Intermediate)(nnx.clone(model), *args)
  shown: dict[str, dict[str, Any]] = {}
  for (*where, name), variable in nnx.to_flat_state(sown):
    place = places.get(tuple(where))  # type: ignore[arg-type]
    if place is not None:
      shown.setdefault(name_of(place), {})[str(name)] = variable.get_value()
  return out, shown


def _sums_of(mean: Moments) -> Moments:
  return Moments(mean.count, mean.count * mean.square, mean.count * mean.fourth)


def _added(several: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *each: sum(each), *several)


def _usual(sums: Moments) -> tuple[Array, Array]:
  """Mean and standard deviation of the squares, whose sums these are."""
  count = jnp.maximum(sums.count, 1.0)
  mean = sums.square / count
  return mean, jnp.sqrt(jnp.maximum(sums.fourth / count - mean**2, 0.0))
