"""An attention function that shows how far its columns are from exact, where asked."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from asap_jax.attention.signature import inputs_of, named_arguments
from asap_jax.metrics import column_error_of_means
from asap_jax.numerics import with_usual_promotion

# Standard deviations of the mean square of a call's sequences that count as chance.
_DEVIATIONS = 4.0


class Usual(nnx.Variable):
  """What calibration saw of a head; see `Moments`."""


class Moments(NamedTuple):
  """Moments of the column errors of some sequences, one for each head.

  Attributes:
    count: of the sequences that show an error: there are tokens, of unequal values.
    square: mean square.
    fourth: mean fourth power.
  """

  count: Float[Array, "..."]  # type: ignore[assignment]  # also a method of tuples
  square: Float[Array, "..."]
  fourth: Float[Array, "..."]


class WatchedAttention(nnx.Module):
  """An attention function whose column errors `nnx.capture` shows: an `attention_fn`.

  Made by `asap_jax.monitor`. Inside of `nnx.capture` for `nnx.Intermediate` each call
  sows `"column_error"`, the root mean square over the batch of
  `asap_jax.metrics.column_error_of_means`, and `"threshold"`, above which it is more
  than calibration saw; both `[heads]`. Outside nothing is computed for it.

  Args:
    attention_fn: doubly stochastic.
    options: arguments bound to it.
    usual: mean and standard deviation of the squares of the column errors of one
      sequence, `[heads]` each; or `None` before they are known.
    margin: error, relative to what was seen, that is taken as usual.

  Example:
    >>> from asap_jax.attention import sinkhorn_attention
    >>> attention = WatchedAttention(sinkhorn_attention)
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> out, seen = nnx.capture(attention, nnx.Intermediate)(tokens, tokens, tokens)
    >>> (errors,) = seen["column_error"]
    >>> errors.shape
    (4,)
  """

  def __init__(
    self,
    attention_fn: Callable[..., jax.Array],
    options: dict[str, Any] | None = None,
    usual: tuple[Array, Array] | None = None,
    margin: float = 1.25,
  ):
    is_module = isinstance(attention_fn, nnx.Module)
    self.attention_fn = (nnx.data if is_module else nnx.static)(attention_fn)
    masks = {k: v for k, v in (options or {}).items() if k in ("max_segments",)}
    self.options = tuple(sorted(masks.items()))
    self.margin = margin
    self.is_calibrated = usual is not None
    if usual is not None:
      self.mean, self.deviation = map(Usual, usual)

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    """The attention function; see `asap_jax.attention.AttentionFn`."""
    out = self.attention_fn(query, key, value, *args, **kwargs)
    # Else it would be written into the module itself.
    if hasattr(self, "__captures__"):
      given = named_arguments(query, key, value, *args, **dict(self.options), **kwargs)
      self._show(moments_of(given, out))
    return out

  def _show(self, seen: Moments) -> None:
    self.sow(nnx.Intermediate, "column_error", jnp.sqrt(seen.square))
    if self.is_calibrated:
      chance = self.deviation[...] / jnp.sqrt(jnp.maximum(seen.count, 1.0))
      square = self.mean[...] + _DEVIATIONS * chance
      self.sow(nnx.Intermediate, "threshold", self.margin * jnp.sqrt(square))
    else:
      self.sow(nnx.Intermediate, "moments", seen)


@with_usual_promotion
def moments_of(given: dict[str, Any], out: Array) -> Moments:
  """Moments of the column errors of one call.

  Args:
    given: all arguments of `asap_jax.attention.AttentionFn`, by name.
    out: what the attention function returned, `[batch..., n, heads, features]`.
  """
  inputs = inputs_of(given)
  errors = column_error_of_means(inputs.value, jnp.moveaxis(out, -2, -3), *inputs.masks)
  squares = errors.reshape(-1, errors.shape[-1]) ** 2
  # What is not a number is an error, and shall be seen.
  count = (squares != 0.0).sum(0).astype(jnp.float32)
  mean = functools.partial(_mean, count=jnp.maximum(count, 1.0))
  return Moments(count, mean(squares), mean(squares * squares))


def _mean(values: Array, count: Array) -> Array:
  return values.sum(0) / count
