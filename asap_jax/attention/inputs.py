"""Arguments of an attention function, checked and laid out; and its last step.

`prepare` puts heads in front, `asap_jax.attention.masks` takes the mask apart, and
`Inputs.attend` applies a plan to the values.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import row_sums
from asap_jax.c_transform.segments import by_segment
from asap_jax.masses import Side, valid_pairs
from asap_jax.numerics import logits_einsum
from asap_jax.sizes import Size
from asap_jax.teacher.starts import Start, starting_dual


@runtime_checkable
class Plan(Protocol):
  """Attention weights that can be applied to values without being formed."""

  def dense(self) -> Array:
    """Masses, `[..., n, m]`, float32."""

  def apply(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    """Masses times values `[..., m, features]`, in the dtype of the values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
  """Queries and keys as one attention sees them: a pytree, heads in front.

  Attributes:
    query: `[batch..., heads, n, dim]`, float32 or better, multiplied by
      scale / epsilon; zero at absent queries.
    key: `[batch..., heads, m, dim]`, one per query head; zero at absent keys.
    bias: added to query key^T, broadcast to `[batch..., heads, n, m]`, or `None`.
    query_mask: valid queries or masses of the queries, `[batch..., heads or 1, n]`, or
      `None` for all.
    key_mask: valid keys or their masses, `[batch..., heads or 1, m]`, or `None` for
      all; of packed sequences masses.
    is_product: per element, whether the mask was the outer product of the two, or that
      of segments; `None` where that is known.
    segments: of packed sequences, `[batch..., heads or 1, n]` and `m`, or `None`.
    precision: of the products (static); `None` keeps logits exact in float32.
    max_segments: most of one element, where that is known (static).
  """

  query: Any
  key: Any
  bias: Any = None
  query_mask: Any = None
  key_mask: Any = None
  is_product: Any = None
  segments: Any = None
  precision: Any = dataclasses.field(default=None, metadata={"static": True})
  max_segments: int | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def masks(self) -> tuple[Array | None, Array | None]:
    """Valid queries and valid keys, or their masses."""
    return self.query_mask, self.key_mask

  @property
  def logits(self) -> Float[Array, "*batch heads n m"]:
    """S = query key^T + bias, far below all others between segments."""
    bias, segments = self.bias_of_pairs, self.segments
    logits = self.products if bias is None else self.products + bias
    return logits if segments is None else logits + segments.log_kernel

  @property
  def bias_of_pairs(self) -> Array | None:
    """The bias, zero at absent pairs, where it may hold anything."""
    pairs = valid_pairs(*self.masks)
    if self.bias is None or pairs is None:
      return self.bias
    return jnp.where(pairs, self.bias, jnp.zeros((), self.bias.dtype))

  def by_segment(self, function: Callable[..., Array]) -> Array:
    """What a function of queries, keys and their masks gives: of each packed sequence.

    Raises:
      ValueError: if sequences are packed and nobody knows how many there are at most.
    """
    if self.segments is None:
      return function(self.query, self.key, *self.masks)
    if self.max_segments is None:
      raise ValueError(
        "max_segments=None with segment_ids whose values are not known under jit, and "
        "an attention that looks at each segment by itself: expected a number"
      )
    of_tokens = functools.partial(function, self.query, self.key)
    return by_segment(of_tokens, self.segments, self.max_segments)

  def starting_dual(self, start: Start, side: Side = "query") -> Array:
    """The dual of a start's name, of each packed sequence by itself."""
    named = functools.partial(starting_dual, start, side=side)
    if start == "zero" and self.segments is not None:
      return named(self.query, self.key)  # of whatever segments
    return self.by_segment(named)

  @property
  def products(self) -> Float[Array, "*batch heads n m"]:
    """query key^T."""
    return logits_einsum(
      "...nd,...md->...nm", self.query, self.key, precision=self.precision
    )


class Sown:
  """Keeps the weights of an attention, to be sown where it was called."""

  weights: Array | None = None


class Dropout(NamedTuple):
  """Dropout of attention weights, and whether they are sown.

  Attributes:
    rng: PRNG key, or `None`.
    rate: share of the weights to drop, zero for none.
    broadcast: whether all batch elements and heads drop the same weights.
    sown: keeps the weights, or `None`.
  """

  rng: Array | None = None
  rate: float = 0.0
  broadcast: bool = True
  sown: Sown | None = None

  @property
  def needs_weights(self) -> bool:
    """Whether the weights have to be formed."""
    return self.sown is not None or self.rate > 0.0


@dataclasses.dataclass(frozen=True)
class Inputs(Activation):
  """One call of an attention function; no pytree.

  Attributes:
    value: `[batch..., heads, m, features]`, in the result's dtype.
    unscaled: `query` in the inputs' dtype, before the multiplication.
    scale: scale / epsilon.
    allowed: pairs that may attend, broadcast to `[batch..., heads, n, m]`, or `None`
      for all; only where a function takes any mask.
    dropout: of the weights.
  """

  value: Any = None
  unscaled: Any = None
  scale: Any = 1.0
  allowed: Any = None
  dropout: Dropout = dataclasses.field(default_factory=Dropout)

  def attend(self, plan: Array | Plan) -> Float[Array, "*batch n heads features"]:
    """Values weighted by the plan, with dropout, sowing and the check of the mask.

    Where queries have masses, rows of the plan are divided by their sums.

    A plan that need not be formed is formed only for dropout or sowing. An element
    whose mask is not an outer product is NaN.

    Raises:
      ValueError: if dropout is active without a PRNG key.
    """
    rng, rate, broadcast, sown = self.dropout
    if not isinstance(plan, jax.Array):
      if not self.dropout.needs_weights:
        return self._finish(self._by_row(plan.apply(self.value, self.precision)))
      plan = plan.dense()
    plan = self._by_row(plan)
    if self.is_product is not None:
      plan = jnp.where(self.is_product, plan, jnp.nan)
    if sown is not None:
      sown.weights = plan
    if rate > 0.0:
      if rng is None:
        raise ValueError("dropout_rng=None: expected a PRNG key, for dropout is active")
      shape = plan.shape[-2:] if broadcast else plan.shape
      keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
      # At a rate of one nothing is kept, and nothing is to be divided by zero.
      plan = jnp.where(keep, plan / (1.0 - rate if rate < 1.0 else 1.0), 0.0)
    out = jnp.einsum(
      "...nm,...mv->...nv",
      plan.astype(self.value.dtype),
      self.value,
      precision=self.precision,
    )
    return self._finish(out)

  def _by_row(self, rows: Array) -> Array:
    """Rows of a plan, or what it made of values, as if each row summed to one."""
    masses = self.query_mask
    if masses is None or masses.dtype == jnp.bool_:
      return rows
    sums = row_sums(masses, rows.shape[-2])[..., None]
    return (rows / jnp.where(sums > 0, sums, 1.0)).astype(rows.dtype)

  def _finish(self, out: Array) -> Array:
    if self.is_product is not None:
      out = jnp.where(self.is_product, out, jnp.nan)
    return jnp.moveaxis(out, -3, -2)


def prepare(
  query: Array,
  key: Array,
  value: Array,
  bias: Array | None = None,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  scale: float | None = None,
  epsilon: float | Array = 1.0,
) -> Inputs:
  """Inputs with heads in front, queries scaled and keys repeated for their groups.

  Raises:
    ValueError: if shapes do not fit or `epsilon` is not positive (a traced one, whose
      value is not known, is taken as it is).
  """
  _check_shapes(query, key, value)
  if not isinstance(epsilon, jax.core.Tracer) and not epsilon > 0:
    raise ValueError(f"epsilon={epsilon}: expected a positive number")
  if bias is not None:
    *batch, n, heads, _ = query.shape
    check_broadcast("bias", bias, (*batch, heads, n, key.shape[-3]))
  heads, dim = query.shape[-2:]
  if dtype is None:
    dtype = jnp.result_type(query, key, value)
    # Integers are promoted as Flax does.
    if not jnp.issubdtype(dtype, jnp.inexact):
      dtype = jnp.promote_types(dtype, jnp.float32)
  groups = heads // key.shape[-2]
  query, key, value = (
    jnp.moveaxis(x, -2, -3).astype(dtype) for x in (query, key, value)
  )
  if groups > 1:
    key, value = (jnp.repeat(x, groups, axis=-3) for x in (key, value))
  # Low-precision inputs lose nothing, low-precision logits lose 4% of a marginal.
  wide = jnp.promote_types(dtype, jnp.float32)
  factor = (dim**-0.5 if scale is None else scale) / epsilon
  return Inputs(
    query=query.astype(wide) * factor,
    key=key.astype(wide),
    bias=bias,
    value=value,
    unscaled=query,
    scale=factor,
    precision=_precision_of(dtype, factor) if precision is None else precision,
  )


def _precision_of(dtype: Any, factor: Any) -> jax.lax.Precision | None:
  """The precision of products of inputs for which none is asked.

  `None` leaves it to each product: that of queries and keys is exact in float32, at
  several times the price of the default on an accelerator. Inputs of 16 bits need not
  pay it. bfloat16 is what a TPU multiplies by itself, and it stays that under a scale
  that is a power of two; else the products of three parts lose nothing that counts.
  """
  if jnp.promote_types(dtype, jnp.float32) == dtype:
    return None
  is_power = isinstance(factor, float) and math.frexp(factor)[0] == 0.5
  exact = dtype == jnp.bfloat16 and is_power
  return jax.lax.Precision.DEFAULT if exact else jax.lax.Precision.HIGH


def _check_shapes(query: Array, key: Array, value: Array) -> None:
  shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
  if not query.ndim == key.ndim == value.ndim or query.ndim < 3:
    raise ValueError(f"{shapes}: expected [batch..., length, heads, dim] for each")
  if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
    raise ValueError(f"{shapes}: expected equal batch axes")
  if 0 in query.shape[-3:] + value.shape[-3:]:
    raise ValueError(f"{shapes}: expected at least one token, head and dimension")
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(f"{shapes}: expected query and key of the same head dimension")
  if key.shape[-3:-1] != value.shape[-3:-1]:
    raise ValueError(f"{shapes}: expected key and value of the same length and heads")
  if query.shape[-2] % key.shape[-2]:
    raise ValueError(
      f"{shapes}: expected the query's heads to be a multiple of the key's"
    )


def check_broadcast(name: str, array: Array, expected: tuple[Size, ...]) -> None:
  """Raises ValueError unless an array broadcasts to the pairs of all heads."""
  fits = array.ndim <= len(expected) and all(
    own in (1, wanted)
    for own, wanted in zip(array.shape[::-1], expected[::-1], strict=False)
  )
  if not fits:
    raise ValueError(
      f"{name} has shape {array.shape}: expected one that broadcasts to [batch..., "
      f"heads, n, m] = {expected}"
    )
