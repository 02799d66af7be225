"""Attention functions under the one signature that Flax's attention layers call.

Each takes queries, keys and values `[batch..., length, heads, head_dim]` and drops in
as `attention_fn` of `nnx.MultiHeadAttention` or `linen.MultiHeadDotProductAttention`;
bind further arguments with `functools.partial`, say `partial(sinkhorn_attention,
iterations=20)`. Logits and duals are float32 whatever the input's dtype.

A mask says which queries and keys are valid: for doubly stochastic attention it must be
the outer product of the two (`nnx.make_attention_mask(query_valid, key_valid)`).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations.dispatch import Implementation
from asap_jax.attention.inputs import Inputs, attend, attend_scaled, prepare, restrict
from asap_jax.c_transform.entropic import plan
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.teacher.sinkhorn import sinkhorn_duals


def softmax_attention(
  query: Float[Array, "*batch n heads dim"],
  key: Float[Array, "*batch m kv_heads dim"],
  value: Float[Array, "*batch m kv_heads features"],
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  module: object | None = None,
  is_causal: bool = False,
  force_fp32_for_softmax: bool = True,
  einsum_dot_general: None = None,
  qk_attn_weights_einsum: None = None,
  attn_weights_value_einsum: None = None,
  *,
  scale: float | None = None,
  epsilon: float = 1.0,
) -> Float[Array, "*batch n heads features"]:
  """Plain softmax attention: rows sum to one, columns to anything.

  Works under jit, vmap and grad.

  Args:
    query: `[batch..., n, heads, dim]`.
    key: `[batch..., m, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
    value: `[batch..., m, kv_heads, features]`.
    bias: added to the logits, broadcast to `[batch..., heads, n, m]`.
    mask: true (or nonzero) where a query may attend, broadcast likewise; any pattern.
    broadcast_dropout: whether all batch elements and heads drop the same weights.
    dropout_rng: PRNG key, needed when dropout is active.
    dropout_rate: share of attention weights to drop.
    deterministic: switches dropout off.
    dtype: dtype of the inputs' products and of the result; inferred by default.
    precision: of the two products; see `jax.lax.Precision`.
    module: where to sow the weights, as `attention_weights`.
    is_causal: forbids attention to later keys.
    force_fp32_for_softmax: accepted for Linen; logits are always float32.
    einsum_dot_general: not supported.
    qk_attn_weights_einsum: not supported.
    attn_weights_value_einsum: not supported.
    scale: of the logits, 1 / sqrt(dim) by default.
    epsilon: temperature that the logits are divided by.

  Returns:
    `[batch..., n, heads, features]`; rows that the mask leaves empty are zero.

  Raises:
    ValueError: if shapes do not fit, or an unsupported argument is given.
  """
  _check_linen(einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
  inputs = prepare(query, key, value, bias, dtype, precision, scale, epsilon)
  logits = inputs.logits
  allowed = None if mask is None else mask != 0
  if is_causal:
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    allowed = causal if allowed is None else allowed & causal
  weights = jax.nn.softmax(logits, axis=-1, where=allowed)
  return attend(
    inputs,
    weights,
    dropout_rng=None if deterministic else dropout_rng,
    dropout_rate=0.0 if deterministic else dropout_rate,
    broadcast_dropout=broadcast_dropout,
    module=module,
  )


def sinkhorn_attention(
  query: Float[Array, "*batch n heads dim"],
  key: Float[Array, "*batch m kv_heads dim"],
  value: Float[Array, "*batch m kv_heads features"],
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  module: object | None = None,
  is_causal: bool = False,
  force_fp32_for_softmax: bool = True,
  einsum_dot_general: None = None,
  qk_attn_weights_einsum: None = None,
  attn_weights_value_einsum: None = None,
  *,
  iterations: int = 20,
  scale: float | None = None,
  epsilon: float = 1.0,
  implementation: Literal["ott", "xla", "chunked", "cudnn"] = "ott",
) -> Float[Array, "*batch n heads features"]:
  """Doubly stochastic attention by Sinkhorn's algorithm (Sander et al., 2022).

  Rows are exact after any number of iterations, columns sum to n_valid / m_valid at
  convergence. Works under jit, vmap and grad (through the unrolled iterations).

  Args:
    query: see `softmax_attention`, as all arguments not listed here.
    key: likewise.
    value: likewise.
    bias: likewise.
    mask: outer product of valid queries and valid keys, broadcast to `[batch...,
      heads, n, m]`; boolean, or numbers that are zero where invalid.
    broadcast_dropout: see `softmax_attention`.
    dropout_rng: likewise.
    dropout_rate: likewise.
    deterministic: likewise.
    dtype: likewise.
    precision: likewise.
    module: likewise.
    is_causal: must be false: see Raises.
    force_fp32_for_softmax: see `softmax_attention`.
    einsum_dot_general: likewise.
    qk_attn_weights_einsum: likewise.
    attn_weights_value_einsum: likewise.
    iterations: full Sinkhorn iterations, each g from f and then f from g.
    scale: see `softmax_attention`.
    epsilon: entropic regularisation; the logits are divided by it.
    implementation: `"ott"` is OTT-JAX's algorithm in the log domain, with an exact
      gradient whose memory does not grow with `iterations`: for training. The others,
      of `asap_jax.attention.implementations`, are the same plan several times faster:
      for inference. `"xla"` forms n x m kernels, `"chunked"` and `"cudnn"` take O(n +
      m) memory. Where the weights are sown or dropped they are formed, whichever is
      named.

  Returns:
    `[batch..., n, heads, features]`, zero at invalid queries. Under jit, where a mask's
    values cannot be checked, an element whose mask is not an outer product is NaN.

  Raises:
    ValueError: for causal use or one-token decoding (a causal doubly stochastic matrix
      is the identity), a mask that is no outer product, shapes that do not fit,
      `iterations` below one, or an `implementation` that is unknown or cannot serve.
  """
  _check_linen(einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
  if implementation not in ("ott", *get_args(Implementation)):
    raise ValueError(
      f"implementation={implementation!r}: expected 'ott', 'xla', 'chunked' or 'cudnn'"
    )
  inputs = prepare(query, key, value, bias, dtype, precision, scale, epsilon)
  inputs = restrict(inputs, mask, is_causal)
  if implementation != "ott":
    return _attend_from(
      inputs,
      jnp.zeros(inputs.query.shape[:-1], inputs.query.dtype),
      iterations,
      None,
      implementation,
      dropout_rng=dropout_rng,
      dropout_rate=0.0 if deterministic else dropout_rate,
      broadcast_dropout=broadcast_dropout,
      module=module,
    )
  duals = sinkhorn_duals(inputs.logits, iterations, inputs.query_mask, inputs.key_mask)
  return attend(
    inputs,
    plan(inputs.logits, duals, inputs.query_mask, inputs.key_mask),
    dropout_rng=None if deterministic else dropout_rng,
    dropout_rate=0.0 if deterministic else dropout_rate,
    broadcast_dropout=broadcast_dropout,
    module=module,
  )


def asap_attention(
  query: Float[Array, "*batch n heads dim"],
  key: Float[Array, "*batch m kv_heads dim"],
  value: Float[Array, "*batch m kv_heads features"],
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.PrecisionLike = None,
  module: object | None = None,
  is_causal: bool = False,
  force_fp32_for_softmax: bool = True,
  einsum_dot_general: None = None,
  qk_attn_weights_einsum: None = None,
  attn_weights_value_einsum: None = None,
  *,
  dual_map: DualMap,
  scale: float | None = None,
  epsilon: float = 1.0,
  implementation: Implementation | None = None,
) -> Float[Array, "*batch n heads features"]:
  """Compiled doubly stochastic attention: a predicted dual and its closures.

  (Tran, Milkert and Hyde, 2026, arXiv 2605.12879.) Rows are exact, columns as good as
  the dual map. Works under jit, vmap and grad, in the leaves of `dual_map` too.

  Args:
    query: see `sinkhorn_attention`, as all arguments not listed here.
    key: likewise.
    value: likewise.
    bias: likewise; the closure sees it, the features of the dual map do not.
    mask: likewise.
    broadcast_dropout: likewise.
    dropout_rng: likewise.
    dropout_rate: likewise.
    deterministic: likewise.
    dtype: likewise.
    precision: likewise.
    module: likewise.
    is_causal: likewise.
    force_fp32_for_softmax: likewise.
    einsum_dot_general: likewise.
    qk_attn_weights_einsum: likewise.
    attn_weights_value_einsum: likewise.
    dual_map: calibrated parameters, one set per head.
    scale: that of the teacher.
    epsilon: that of the teacher.
    implementation: of the closures and the product with the values, `"xla"`,
      `"chunked"` or `"cudnn"` (`asap_jax.attention.implementations`); `None` takes the
      best for device, dtype and shape. Where the weights are sown or dropped they are
      formed, whichever is named.

  Returns:
    As `sinkhorn_attention`.

  Raises:
    ValueError: as `sinkhorn_attention`, and if `dual_map` does not fit the heads.
  """
  _check_linen(einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum)
  inputs = prepare(query, key, value, bias, dtype, precision, scale, epsilon)
  inputs = restrict(inputs, mask, is_causal)
  _check_dual_map(dual_map, inputs)
  return _attend_from(
    inputs,
    functools.partial(predict_dual, dual_map),
    dual_map.closures,
    dual_map.relaxation,
    implementation,
    dropout_rng=dropout_rng,
    dropout_rate=0.0 if deterministic else dropout_rate,
    broadcast_dropout=broadcast_dropout,
    module=module,
  )


def _attend_from(
  inputs: Inputs,
  f: jax.Array | Callable[..., jax.Array],
  count: int,
  relaxation: jax.Array | None,
  implementation: Implementation | None,
  *,
  dropout_rate: float,
  module: object | None,
  **dropout: Any,
) -> jax.Array:
  """Attention by `count` closures from f; forms the plan only where it is asked for.

  What is given for f may predict it, as in `scaled_attention`.
  """
  if module is None and dropout_rate == 0.0:
    return attend_scaled(inputs, f, count, relaxation, implementation)
  masks = inputs.query_mask, inputs.key_mask
  if callable(f):
    f = f(inputs.query, inputs.key, *masks)
  scaled = scaled_plan(inputs.logits, f, count, *masks, relaxation=relaxation)
  return attend(
    inputs, scaled.dense(), dropout_rate=dropout_rate, module=module, **dropout
  )


def _check_linen(*given: object) -> None:
  if any(argument is not None for argument in given):
    raise ValueError(
      "einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: not "
      "supported here; expected None"
    )


def _check_dual_map(dual_map: DualMap, inputs: Inputs) -> None:
  heads, _, dim = dual_map.directions.shape
  if (heads, dim) != (inputs.query.shape[-3], inputs.query.shape[-1]):
    raise ValueError(
      f"dual_map was calibrated for {heads} heads of dimension {dim}: got "
      f"{inputs.query.shape[-3]} heads of dimension {inputs.query.shape[-1]}"
    )
