"""One attention layer from arrays to a fitted operator, for any framework or none."""

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from asap_jax.attention.functions import (
  Teacher,
  check_implementation,
  check_iterations,
  sinkhorn_attention,
)
from asap_jax.attention.inputs import Activation
from asap_jax.attention.signature import AttentionFn, inputs_of
from asap_jax.compiler import standing
from asap_jax.compiler.batches import kind_of
from asap_jax.compiler.operators import Operator, Sinkhorn
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recorded import Calls, Layer, Recorded
from asap_jax.compiler.recorder import flatten_batch, without_explicit_axes
from asap_jax.compiler.report import LayerReport
from asap_jax.numerics import with_usual_promotion
from asap_jax.teacher.starts import Start


class AttentionCall(NamedTuple):
  """What one call of an attention layer was given: a pytree, a batch for `fit`.

  Values are not asked for: plans do not depend on them, and where calls are timed the
  keys stand for them, as in `asap_jax.compile`.

  Attributes:
    query: `[batch, n, heads, dim]`.
    key: `[batch, m, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
    mask: true (or nonzero) where a query may attend to a key, the outer product of
      valid queries and valid keys, broadcast to `[batch, heads, n, m]`; `None` for all.
    bias: added to the logits, broadcast likewise; `None` for none.
    query_weights: masses of the queries, `[batch, n]` or `[batch, heads, n]`; `None`
      for equal ones. See `asap_jax.attention.AttentionFn`.
    key_weights: likewise, of the keys.

  Example:
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> AttentionCall(tokens, tokens).query.shape
    (2, 6, 4, 8)
  """

  query: Shaped[Array | np.ndarray, "batch n heads dim"]
  key: Shaped[Array | np.ndarray, "batch m kv_heads dim"]
  mask: Shaped[Array | np.ndarray, "..."] | None = None
  bias: Float[Array | np.ndarray, "..."] | None = None
  query_weights: Float[Array | np.ndarray, "..."] | None = None
  key_weights: Float[Array | np.ndarray, "..."] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FittedAttention:
  """An attention function that is a pytree: its leaves are those of its operator.

  It is called as an `asap_jax.attention.AttentionFn`, and drops in as an
  `attention_fn`. It may be an argument of jit, a carry of scan, and what a gradient is
  taken in; stacked leaf by leaf it serves the layers of a scan.

  Attributes:
    operator: a dual map, or iterations, which have no leaves.
    scale: of the logits, 1 / sqrt(dim) by default (static, as the next).
    epsilon: the logits are divided by it.

  Example:
    >>> attend = FittedAttention(Sinkhorn(3))
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> attend(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """

  operator: Operator
  scale: float | None = dataclasses.field(default=None, metadata={"static": True})
  epsilon: float = dataclasses.field(default=1.0, metadata={"static": True})

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """Values weighted by attention; see `asap_jax.attention.AttentionFn`."""
    options = {"scale": self.scale, "epsilon": self.epsilon} | kwargs
    return self.operator.attention_fn(*args, **options)

  # Linen passes on only what it finds in a signature.
  __call__.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    AttentionFn.__call__
  )


class Fitted(NamedTuple):
  """Result of `fit`.

  Attributes:
    attention_fn: stands for the layer's Sinkhorn attention.
    report: what that gains, and its fidelity.
  """

  attention_fn: FittedAttention
  report: LayerReport


class _Named(NamedTuple):
  """The layer that arrays are of."""

  name: str
  teacher: Sinkhorn


def fit(
  batches: Iterable[AttentionCall],
  operator: Recipe | Sinkhorn | None = None,
  *,
  iterations: int = 20,
  implementation: Teacher | None = None,
  start: Start = "zero",
  relaxation: float = 1.0,
  tolerance: float | None = None,
  scale: float | None = None,
  epsilon: float = 1.0,
  target_tv: float = 0.05,
  name: str = "attention",
  seed: int = 0,
  progress: bool = True,
) -> Fitted:
  """Fits an operator to one Sinkhorn attention layer, from what it was given.

  What `asap_jax.compile` does for every layer of a Flax NNX model, for a layer of any
  framework or none (docs/functional.md): who can collect the queries and keys of a
  layer needs nothing else. Host code: it does not run under jit, vmap or grad; the
  attention function does.

  Args:
    batches: one call of the layer for each, at least two, all of equal heads. As of
      `asap_jax.compile`: every fifth, from the second on, is held out.
    operator: `None` for the best by measurement; a `Recipe`, or
      `asap_jax.compiler.Sinkhorn`, for a fixed one.
    iterations: of the layer as trained; see `asap_jax.sinkhorn_attention`.
    implementation: likewise.
    start: likewise.
    relaxation: likewise.
    tolerance: likewise.
    scale: likewise: of the logits, 1 / sqrt(dim) by default.
    epsilon: likewise: the logits are divided by it.
    target_tv: see `asap_jax.compile`.
    name: of the layer in the report.
    seed: of random directions, of networks and of the order of refinement.
    progress: whether to show progress bars.

  Returns:
    `Fitted`: the attention function and the report.

  Raises:
    ValueError: if there are too few batches or tokens, if shapes do not fit, a mask is
      not the outer product of valid queries and valid keys, arrays are not finite or
      masses negative, or if an option makes no sense.

  Example:
    >>> import asap_jax
    >>> tokens = jax.random.normal(jax.random.key(0), (3, 2, 4, 6, 2, 8))
    >>> batches = [asap_jax.AttentionCall(query, key) for query, key in tokens]
    >>> fixed = asap_jax.compiler.Sinkhorn(2)
    >>> attend, report = fit(batches, fixed, iterations=3, progress=False)
    >>> attend(*tokens[0], tokens[0, 1]).shape, report.tv.shape
    ((4, 6, 2, 8), (2,))
  """
  standing.check_wanted(operator, target_tv)
  check_implementation(implementation)
  check_iterations(iterations, start, relaxation, tolerance)
  if iterations < 1:
    raise ValueError(
      f"iterations={iterations}: expected at least one, or there is nothing to save"
    )
  teacher = Sinkhorn(iterations, implementation, start, relaxation, tolerance)
  recorded = _recorded(_Named(name, teacher), batches, scale, epsilon, progress)
  (made,) = standing.wanted(recorded, operator, target_tv, seed)
  (layer,) = recorded.layers
  return Fitted(
    FittedAttention(made.operator, scale, epsilon), standing.report_of(layer, made)
  )


def _recorded(
  site: _Named,
  batches: Iterable[AttentionCall],
  scale: float | None,
  epsilon: float,
  progress: bool,
) -> Recorded:
  """The streams of one layer; every batch is checked as it is read."""
  layers: list[Layer] = []

  def record(batch: Any) -> Calls:
    seen = _activation(batch, scale, epsilon)
    heads, dim = seen.query.shape[1], seen.query.shape[3]
    if layers and (heads, dim) != (layers[0].heads, layers[0].dim):
      raise ValueError(
        f"query has shape {batch.query.shape}: expected {layers[0].heads} heads of "
        f"dimension {layers[0].dim}, as in the first batch"
      )
    return without_explicit_axes([(seen,)])

  recorded = Recorded([site], layers, batches, record, progress)
  ((first,),) = record(recorded.first)
  layers.append(Layer(site, None, first.query.shape[1], first.query.shape[3]))
  return recorded


@with_usual_promotion
def _activation(
  batch: AttentionCall, scale: float | None, epsilon: float
) -> Activation:
  """A batch as a layer that is called with it sees it, checked."""
  if not isinstance(batch, AttentionCall):
    raise ValueError(
      f"batches: one is of {kind_of(batch)}; expected asap_jax.AttentionCall(query, "
      "key, mask, bias, query_weights, key_weights)"
    )
  given = {name: jnp.asarray(x) for name, x in batch._asdict().items() if x is not None}
  _check(given)
  call = _SIGNATURE.bind(
    **given, value=given["key"], scale=scale, epsilon=epsilon, deterministic=True
  )
  call.apply_defaults()
  return flatten_batch(inputs_of(call.arguments))


_SIGNATURE = inspect.signature(sinkhorn_attention)


def _check(given: dict[str, jax.Array]) -> None:
  """Raises ValueError unless queries and keys fit; masks and bias are seen to later."""
  query, key = given["query"], given["key"]
  for name, array in (("query", query), ("key", key)):
    if array.ndim != 4:
      raise ValueError(
        f"{name} has shape {array.shape}: expected [batch, length, heads, head_dim]"
      )
    if array.size == 0:
      raise ValueError(f"{name} has shape {array.shape}: expected no axis to be empty")
  if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
    raise ValueError(
      f"key has shape {key.shape}, query {query.shape}: expected equal batches and "
      "head dimensions"
    )
  if query.shape[2] % key.shape[2]:
    raise ValueError(
      f"key has {key.shape[2]} heads, query {query.shape[2]}: expected a divisor"
    )
