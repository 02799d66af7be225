"""What the attention of a model does: sinks, rank through depth, gain, entropy."""

import functools
import inspect
import io
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from asap_jax import metrics
from asap_jax.attention.signature import named_arguments
from asap_jax.compiler.sites import (
  Place,
  check_is_nnx,
  find_held,
  name_of,
  replace_held,
)

# Shares of the queries' attention above which a key counts as a sink.
SINKS = (0.3, 0.8)


class LayerDiagnosis(NamedTuple):
  r"""One attention layer, means over sequences; every array is `[heads]`.

  Attributes:
    name: path in the model.
    largest_column: largest mean column of the plan, $\max_j \frac{1}{n} \sum_i
      A_{ij}$: 1 / n in a doubly stochastic plan of n queries and keys, 1 if all look at
      one key.
    sinks: share of sequences where that exceeds 0.3, and 0.8, `[2, heads]`; their mean
      over heads is the share of heads with an attention sink.
    entropy: of rows, in nats.
    column_error: mean of `asap_jax.metrics.column_error`.
    residual: rank residual of the head's outputs, by both norms, `[2, heads]`.
  """

  name: str
  largest_column: np.ndarray
  sinks: np.ndarray
  entropy: np.ndarray
  column_error: np.ndarray
  residual: np.ndarray


class PathDiagnosis(NamedTuple):
  r"""Products of plans along paths through depth, $A_l \cdots A_1$; `[layers, heads]`.

  A path goes through the head of the same number in every layer. Entry l is of the
  first l + 1 layers.

  Attributes:
    residual: rank residual of the product, by both norms, `[2, layers, heads]`.
    row_gain: largest sum of a row.
    column_gain: largest sum of a column.
    least_singular: smallest singular value, on valid tokens.
  """

  residual: np.ndarray
  row_gain: np.ndarray
  column_gain: np.ndarray
  least_singular: np.ndarray


class Diagnosis(NamedTuple):
  """Of all attention layers of a model; prints as a table, draws as `plot`.

  Attributes:
    layers: in the order in which the model holds them.
    paths: through all of them; `None` if layers differ in length or heads, or plans are
      not square.
    states: rank residual of the states that `diagnose` was given, by both norms,
      `[2, states]`, or `None`.

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    >>> found = diagnose(layer, [jax.random.normal(jax.random.key(0), (4, 6, 8))])
    >>> found.sink_share
    (0.0, 0.0)
  """

  layers: tuple[LayerDiagnosis, ...]
  paths: PathDiagnosis | None
  states: np.ndarray | None

  @property
  def sink_share(self) -> tuple[float, float]:
    """Share of the heads of all layers with a sink above 0.3, and above 0.8."""
    low, high = np.mean([layer.sinks.mean(-1) for layer in self.layers], 0)
    return float(low), float(high)

  def __str__(self) -> str:
    low, high = self.sink_share
    table = Table(
      caption=f"Heads with a sink above {SINKS[0]}: {low:.3f}; above {SINKS[1]}: "
      f"{high:.3f}. Means over heads.",
      caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    names = ["largest column", "entropy", "column error", "residual"]
    if self.paths is not None:
      names += ["of path", "row gain", "column gain", "least singular"]
    for name in names:
      table.add_column(name, justify="right")
    for index, layer in enumerate(self.layers):
      figures = [layer.largest_column, layer.entropy, layer.column_error]
      shown = [f"{each.mean():.4f}" for each in (*figures, layer.residual[0])]
      if self.paths is not None:
        residual, rows, columns, least = self.paths
        gains = residual[0, index], rows[index], columns[index]
        shown += [f"{each.mean():.4f}" for each in gains]
        # It falls by orders of magnitude.
        shown.append(f"{least[index].mean():.1e}")
      table.add_row(escape(layer.name), *shown)
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_jupyter=False, force_terminal=False)
    console.print(table)
    return stream.getvalue().rstrip("\n")

  def plot(self, axes: Any = None) -> Any:
    """Draws rank residual and gain of paths through depth; see `plot_paths`.

    Needs Matplotlib, which comes with the extra `experiments`.
    """
    from asap_jax.plotting import plot_paths  # Matplotlib is optional

    if self.paths is None:
      raise ValueError("paths=None: layers differ in shape, and make no path to draw")
    return plot_paths(
      self.paths.residual[0], self.paths.column_gain, self.paths.least_singular, axes
    )


def diagnose(
  model: nnx.Module,
  batches: Iterable[Any],
  *,
  call: Callable[[nnx.Module, Any], Any] = lambda model, batch: model(batch),
  states: Callable[[nnx.Module, Any], Sequence[Array]] | None = None,
) -> Diagnosis:
  r"""Reports of every attention layer what the literature reports, softmax or not.

  Sinks as Gu et al. (2025, "When attention sink emerges in language models", section
  3.1) count them, for the key that receives most; the rank residual of outputs and of
  products of plans (Dong et al., 2021, "Attention is not all you need", section 2.1),
  by their norm $\sqrt{|.|_1 |.|_\infty}$ and by Frobenius'; the gain of composed plans,
  their largest row and column sums (Xie et al., 2025, "mHC: manifold-constrained
  hyper-connections", section 5.4). The functions of `asap_jax.metrics` compute them.

  Plans are formed, whatever computes the attention: take batches of moderate size. Host
  code: it does not run under jit, vmap or grad.

  Args:
    model: any NNX model whose modules hold attention functions: as `attention_fn`, or
      functions of query, key and value anywhere (softmax, Sinkhorn, compiled, peers).
      It is left untouched and runs in evaluation mode.
    batches: inputs; equal shapes compile once.
    call: how a batch is given to the model.
    states: hidden states of the model on a batch, `[batch, n, width]` each, to report
      their rank residual too.

  Returns:
    `Diagnosis`.

  Raises:
    ValueError: if the model holds no attention function, or calls none that it holds;
      or if there is no batch.

  Example:
    >>> layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    >>> batches = jax.random.normal(jax.random.key(0), (1, 4, 6, 8))
    >>> found = diagnose(layer, batches)
    >>> found.layers[0].entropy.shape, found.paths.row_gain.round(4).tolist()
    ((2,), [[1.0, 1.0]])
  """
  check_is_nnx(model)
  held: dict[Place, Any] = {
    place: function
    for place, function in find_held(model, object).items()
    if _is_attention(place[1], function)
  }
  outer = [(*path, attribute) for path, attribute in held]
  # What an attention function holds itself is a part of it.
  held = {
    (path, attribute): function
    for (path, attribute), function in held.items()
    if not any(path[: len(above)] == above for above in outer)
  }
  if not held:
    raise ValueError(
      "model holds no attention function: expected a Flax NNX module with "
      "attention_fn, or another function of query, key and value"
    )
  order: list[str] = []
  seeing = {
    place: _Seen(function, functools.partial(order.append, name_of(place)))
    for place, function in held.items()
  }
  observed = replace_held(model, seeing)
  observed.eval()
  graph, state = nnx.split(observed)
  look = jax.jit(functools.partial(_figures, graph, call, states, order))
  found = [jax.tree.map(np.asarray, look(state, batch)) for batch in batches]
  if not found:
    raise ValueError("batches is empty: expected at least one batch")
  if not found[0].layers:
    raise ValueError(
      "no call of an attention function was seen; pass call=, or batches that reach it"
    )
  names = list(dict.fromkeys(order))  # JAX sorts those of a dictionary
  weights = [each.sequences for each in found]
  pooled = jax.tree.map(lambda *each: np.average(each, 0, weights=weights), *found)
  return Diagnosis(
    tuple(LayerDiagnosis(name, *pooled.layers[name]) for name in names),
    None if pooled.paths is None else PathDiagnosis(*pooled.paths),
    pooled.states,
  )


class _Seen(nnx.Module):
  """An attention function that sows its plan, what its heads put out, and who is valid.

  All have one batch axis in front.
  """

  def __init__(self, function: Callable[..., jax.Array], tell: Callable[[], None]):
    kind = nnx.data if isinstance(function, nnx.Module) else nnx.static
    self.function = kind(function)
    self.tell = nnx.static(tell)

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    self.tell()
    out = self.function(query, key, value, *args, **kwargs)
    plan, of_heads = (
      jnp.moveaxis(x, -2, -3).reshape(-1, x.shape[-2], x.shape[-3], x.shape[-1])
      for x in (self._weights(query, key, value, *args, **kwargs), out)
    )
    given = named_arguments(query, key, value, *args, **kwargs)
    mask, segments = given["mask"], given["segment_ids"]
    for argument in ("query_weights", "key_weights"):
      if given[argument] is not None:
        raise ValueError(
          f"{argument}: the figures of a diagnosis are those of equal masses; expected "
          "None"
        )
    queries, keys = (
      jnp.ones(plan.shape[:-1], bool),
      jnp.ones_like(plan[..., 0, :], bool),
    )
    if mask is not None:
      # Flax spreads the attention of queries that see nothing over all keys.
      pairs = (*query.shape[:-3], query.shape[-2], query.shape[-3], plan.shape[-1])
      mask = (jnp.broadcast_to(mask, pairs) != 0).reshape(plan.shape)
      queries, keys = mask.any(-1), mask.any(-2)
    elif segments is not None:
      of_each = segments if isinstance(segments, tuple) else (segments, segments)
      queries, keys = (
        jnp.broadcast_to(ids.reshape(-1, 1, ids.shape[-1]) > 0, all_of.shape)
        for ids, all_of in zip(of_each, (queries, keys), strict=True)
      )
    plan = jnp.where(queries[..., None] & keys[..., None, :], plan, 0.0)
    self.sow(nnx.Intermediate, "seen", _Call(plan, of_heads, queries, keys))
    return out

  def _weights(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    """What attention makes of the unit vectors, `[batch..., n, heads, m]`."""
    m, heads, features = value.shape[-3:]
    # Functions of others may take values of the keys' width alone.
    width = m if _module_of(self.function).startswith("asap_jax.") else features
    units = jnp.eye(m, math.ceil(m / width) * width)[:, None]
    units = jnp.broadcast_to(units, (*value.shape[:-3], m, heads, units.shape[-1]))
    query, key = (x.astype(jnp.float32) for x in (query, key))
    columns = [
      self.function(query, key, units[..., i : i + width], *args, **kwargs)
      for i in range(0, m, width)
    ]
    return jnp.concatenate(columns, -1)[..., :m]


class _Call(NamedTuple):
  """`[batch, heads, n, m]`, `[.., n, features]`, `[.., n]` and `[.., m]`."""

  plan: Array
  out: Array
  queries: Array
  keys: Array


class _Figures(NamedTuple):
  """Of a batch, means over its sequences."""

  sequences: Array
  layers: dict[str, tuple[Array, ...]]
  paths: tuple[Array, ...] | None
  states: Array | None


def _is_attention(attribute: str | int, held: Any) -> bool:
  if not callable(held) or isinstance(held, type):
    return False
  is_module = isinstance(held, nnx.Module) and attribute != "attention_fn"
  if is_module and not _module_of(held).startswith("asap_jax."):
    return False
  try:
    names = list(inspect.signature(held).parameters)
  except (TypeError, ValueError):  # of what is built in
    return False
  return names[:3] == ["query", "key", "value"]


def _module_of(held: Any) -> str:
  """The Python module of a function, under partials and jit, or of an object."""
  while isinstance(held, functools.partial):
    held = held.func
  held = inspect.unwrap(held)
  return getattr(held, "__module__", None) or type(held).__module__


def _figures(
  graph: nnx.GraphDef,
  call: Callable[[nnx.Module, Any], Any],
  states: Callable[[nnx.Module, Any], Sequence[Array]] | None,
  order: list[str],
  state: nnx.State,
  batch: Any,
) -> _Figures:
  """All of a batch; `order` gets the names of the layers as they are called."""
  model = nnx.merge(graph, state)
  residuals = None
  if states is not None:
    tokens = [jnp.stack(residuals_of(x)) for x in states(model, batch)]
    residuals = jnp.stack([x.reshape(2, -1).mean(-1) for x in tokens], -1)
  order.clear()
  _, sown = nnx.capture(call, nnx.Intermediate)(model, batch)
  seen: dict[str, tuple[_Call, ...]] = {}
  for (*where, _), variable in nnx.to_flat_state(sown):
    *path, attribute = where
    seen[name_of((tuple(path), attribute))] = variable.get_value()  # type: ignore[arg-type]
  calls = _in_order(order, seen)
  order[:] = calls
  first = next(iter(calls.values()), None)
  return _Figures(
    jnp.array(0.0 if first is None else len(first.plan)),
    {name: _of_call(each) for name, each in calls.items()},
    _of_paths(list(calls.values())),
    residuals,
  )


def _in_order(order: list[str], seen: dict[str, tuple[_Call, ...]]) -> dict[str, _Call]:
  """Calls by the names of layers, in the order of the calls, those of scans apart."""
  calls: dict[str, _Call] = {}
  told: dict[str, int] = {}
  for name in order:
    told[name] = told.get(name, 0) + 1
    # JAX may trace the body of a loop more than once.
    if told[name] > len(seen[name]):
      continue
    each = seen[name][told[name] - 1]
    of_call = name if len(seen[name]) == 1 else f"{name}, call {told[name]}"
    if each.plan.ndim == 4:
      calls[of_call] = each
      continue
    for layer in range(len(each.plan)):
      one = jax.tree.map(operator.itemgetter(layer), each)
      calls[f"{of_call}[{layer}]"] = one
  return calls


def _of_call(seen: _Call) -> tuple[Array, ...]:
  """The figures of a `LayerDiagnosis`."""
  plan, out, queries, keys = seen
  count = jnp.maximum(queries.sum(-1, keepdims=True), 1)
  largest = (plan.sum(-2) / count).max(-1)
  rows = metrics.row_entropy(plan)
  columns = metrics.column_error(plan, queries, keys)
  return (
    largest.mean(0),
    jnp.stack([(largest > least).mean(0) for least in SINKS]),
    _mean(rows, queries).mean(0),
    _mean(columns, keys).mean(0),
    jnp.stack(residuals_of(out, queries)).mean(1),
  )


def _of_paths(calls: list[_Call]) -> tuple[Array, ...] | None:
  """The figures of a `PathDiagnosis`, where there are paths."""
  shapes = {each.plan.shape for each in calls}
  if len(shapes) != 1 or len({*calls[0].plan.shape[-2:]}) != 1:
    return None
  product, found = None, []
  for plan, _, queries, keys in calls:
    product = (
      plan if product is None else jnp.einsum("...ij,...jk->...ik", plan, product)
    )
    # Absent points stay where they are: a singular value of one is never the least.
    padded = product + jnp.eye(plan.shape[-1]) * ~(queries & keys)[..., None, :]
    found.append(
      (
        jnp.stack(residuals_of(product, queries)).mean(1),
        product.sum(-1).max(-1).mean(0),
        product.sum(-2).max(-1).mean(0),
        jnp.linalg.svd(padded, compute_uv=False)[..., -1].mean(0),
      )
    )
  residual, *others = (jnp.stack(each, -2) for each in zip(*found, strict=True))
  return residual, *others


def residuals_of(
  tokens: Float[Array, "*batch n dim"], mask: Array | None = None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
  """Rank residuals of tokens by both norms."""
  of_norm = functools.partial(metrics.rank_residual, tokens, mask)
  return of_norm(norm="composite"), of_norm(norm="frobenius")


def _mean(values: Array, mask: Array) -> Array:
  return (values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1)
