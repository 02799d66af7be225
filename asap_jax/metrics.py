"""Fidelity to a teacher's plan, double stochasticity, rank and attention sinks.

Functions return one value per row, column or sequence; `masked_mean` pools them. All of
them work under jit, vmap and grad. Padding is zero in a plan (see `c_transform.plan`).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.masses import Masses, normalised, valid, zero_invalid
from asap_jax.masses import mean as mean_of

_TINY = 1e-30


def masked_mean(
  values: Float[Array, "..."], mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
  """Mean over all values, or over those where a mask holds.

  Args:
    values: of any shape.
    mask: broadcast to it; all by default.

  Returns:
    The mean; zero where the mask holds nowhere.
  """
  if mask is None:
    return values.mean()
  mask = jnp.broadcast_to(mask, values.shape)
  return jnp.where(mask, values, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def total_variation(
  plan: Float[Array, "*batch n m"], reference: Float[Array, "*batch n m"]
) -> Float[Array, "*batch n"]:
  """Total variation distance of each row: half the l1 distance.

  Args:
    plan: attention weights `[..., n, m]`.
    reference: the teacher's attention weights `[..., n, m]`.

  Returns:
    `[..., n]`, 0 to 1.
  """
  return 0.5 * jnp.abs(plan - reference).sum(-1)


def kl_divergence(
  plan: Float[Array, "*batch n m"], reference: Float[Array, "*batch n m"]
) -> Float[Array, "*batch n"]:
  """Divergence of each row from the teacher's: KL(reference || plan).

  Args:
    plan: attention weights `[..., n, m]`.
    reference: the teacher's attention weights `[..., n, m]`.

  Returns:
    `[..., n]`, in nats.
  """
  log_ratio = jnp.log(reference + _TINY) - jnp.log(plan + _TINY)
  return (reference * log_ratio).sum(-1)


def row_error(plan: Float[Array, "*batch n m"]) -> Float[Array, "*batch n"]:
  """Error of each row sum: $|sum - 1|$.

  Args:
    plan: attention weights `[..., n, m]`.

  Returns:
    `[..., n]`.
  """
  return jnp.abs(plan.sum(-1) - 1.0)


def column_error(
  plan: Float[Array, "*batch n m"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch m"]:
  """Relative error of each column sum: $|sum / (n_{valid} / m_{valid}) - 1|$.

  Args:
    plan: attention weights `[..., n, m]`; with masses of the queries those of
      `asap_jax.plan`, whose rows sum to them.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`; columns of masses $b_j$ are to sum to
      $n_{valid} b_j$.

  Returns:
    `[..., m]`, zero at keys that are not valid.
  """
  n, m = plan.shape[-2:]
  queries = valid(query_weights)
  rows = n if queries is None else queries.sum(-1, keepdims=True)
  target = rows * normalised(key_weights, m)
  error = jnp.abs(plan.sum(-2) / jnp.maximum(target, _TINY) - 1.0)
  return zero_invalid(error, key_weights)


def column_error_of_means(
  value: Float[Array, "*batch m features"],
  output: Float[Array, "*batch n features"],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch"]:
  r"""The column error that the means of values and outputs show, without the plan.

  A plan whose columns are exact keeps the mean: with relative errors $\epsilon_j$ of
  the columns of a plan A with rows that sum to one, and masses $a_i$ and $b_j$,

  $$\sum_i a_i (A v)_i - \sum_j b_j v_j = \sum_j b_j \epsilon_j v_j.$$

  What is returned is the root mean square of $\epsilon$ that lets expect so much, were
  the errors dealt to the keys at random. Where they go with the values it is off by a
  factor, which a layer and its head keep: compare it with what the same head shows on
  other data. It needs O(n + m) operations a feature, whatever computed the output.

  Args:
    value: `[..., m, features]`.
    output: values weighted by the plan, `[..., n, features]`.
    query_weights: `None`, mask or masses `[..., n]`; outputs of absent queries may hold
      anything.
    key_weights: the same of the keys, `[..., m]`.

  Returns:
    `[...]`; zero where all values are alike, or there are none.

  Example:
    >>> values = jnp.array([[1.0], [-1.0]])
    >>> column_error_of_means(values, values).tolist()  # the identity
    0.0
    >>> column_error_of_means(values, jnp.ones((2, 1))).tolist()  # all to the first key
    1.0
  """
  m = value.shape[-2]
  value, output = value.astype(jnp.float32), output.astype(jnp.float32)
  value = zero_invalid(value, key_weights, axis=-2)
  b = normalised(key_weights, m)
  mean = (b[..., None] * value).sum(-2)
  moved = mean_of(output, query_weights, axis=-2)[..., 0, :] - mean
  deviation = (b * ((value - mean[..., None, :]) ** 2).sum(-1)).sum(-1)
  # Of unequal masses fewer keys count; the errors of one follow from the others'.
  free = 1.0 / jnp.maximum((b * b).sum(-1), _TINY) - 1.0
  square = free * (moved * moved).sum(-1) / jnp.where(deviation > 0, deviation, 1.0)
  return jnp.where(deviation > 0, jnp.sqrt(square), 0.0 * square)


def row_entropy(plan: Float[Array, "*batch n m"]) -> Float[Array, "*batch n"]:
  r"""Entropy of each row: 0 for a permutation, $\log m$ for a uniform row.

  Args:
    plan: attention weights `[..., n, m]`.

  Returns:
    `[..., n]`, in nats.
  """
  safe = jnp.where(plan > 0, plan, 1.0)
  return -(plan * jnp.log(safe)).sum(-1)


def attention_sink_share(plan: Float[Array, "*batch n m"]) -> Float[Array, "*batch"]:
  """Share of all attention that the most attended key receives.

  A doubly stochastic plan has 1/m_valid; an attention sink takes much more (Xiao et
  al., 2024, "Efficient Streaming Language Models with Attention Sinks").

  Args:
    plan: attention weights `[..., n, m]`.

  Returns:
    `[...]`, 1 / m to 1.
  """
  columns = plan.sum(-2)
  return columns.max(-1) / jnp.maximum(columns.sum(-1), _TINY)


def rank_residual(
  tokens: Float[Array, "*batch n dim"],
  mask: Bool[Array, "..."] | None = None,
  *,
  norm: Literal["composite", "frobenius"] = "composite",
) -> Float[Array, "*batch"]:
  r"""Distance of tokens from being all alike: $|X - 1 \bar x^T| / |X|$.

  The norm is $\sqrt{|.|_1 |.|_\infty}$ (Dong et al., 2021, "Attention is not all you
  need: pure attention loses rank doubly exponentially with depth", section 2.1), or
  Frobenius', and $\bar x$ the mean of the valid tokens. Each layer's output in turn
  shows rank through depth.

  Args:
    tokens: hidden states `[..., n, dim]`.
    mask: valid tokens `[..., n]`, all by default.
    norm: `"composite"` or `"frobenius"`.

  Returns:
    `[...]`, 0 to about 1 (to 1 for Frobenius' norm).

  Raises:
    ValueError: if the norm is unknown.
  """
  norms = {"composite": _composite_norm, "frobenius": _frobenius_norm}
  if norm not in norms:
    raise ValueError(f"norm={norm!r}: expected one of {', '.join(norms)}")
  if mask is None:
    mask = jnp.ones(tokens.shape[:-1], bool)
  keep = mask[..., None]
  tokens = jnp.where(keep, tokens.astype(jnp.float32), 0.0)
  count = jnp.maximum(keep.sum(-2, keepdims=True), 1)
  residual = jnp.where(keep, tokens - tokens.sum(-2, keepdims=True) / count, 0.0)
  return norms[norm](residual) / jnp.maximum(norms[norm](tokens), _TINY)


def _composite_norm(matrix: Array) -> Array:
  magnitude = jnp.abs(matrix)
  return _root(magnitude.sum(-2).max(-1) * magnitude.sum(-1).max(-1))


def _frobenius_norm(matrix: Array) -> Array:
  return _root((matrix * matrix).sum((-2, -1)))


def _root(square: Array) -> Array:
  # The square root has no gradient at zero.
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
