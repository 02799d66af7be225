"""Softmax, Sinkhorn and compiled attention.

Each is an `AttentionFn`: it takes queries, keys and values `[batch..., length, heads,
head_dim]` and drops in as `attention_fn` of `nnx.MultiHeadAttention` or
`linen.MultiHeadDotProductAttention`; further arguments are bound with
`functools.partial`. Logits and duals are float32 whatever the input's dtype.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.implementations.dispatch import ClosedPlan, Implementation
from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.c_transform.entropic import plan
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.teacher.sinkhorn import sinkhorn_duals


@attention_fn(any_mask=True)
def softmax_attention(inputs: Inputs) -> Array:
  """Plain softmax attention: rows sum to one, columns to anything.

  Works under jit, vmap and grad.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, any mask included.

  Returns:
    `[batch..., n, heads, features]`; rows that the mask leaves empty are zero.

  Raises:
    ValueError: if shapes do not fit, or an unsupported argument is given.

  Example:
    >>> import jax
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> softmax_attention(tokens, tokens, tokens, is_causal=True).shape
    (2, 6, 4, 8)
  """
  return inputs.attend(jax.nn.softmax(inputs.logits, axis=-1, where=inputs.allowed))


@attention_fn
def sinkhorn_attention(
  inputs: Inputs,
  *,
  iterations: int = 20,
  implementation: Literal["ott", "xla", "chunked", "cudnn"] = "ott",
) -> Array:
  """Doubly stochastic attention by Sinkhorn's algorithm (Sander et al., 2022).

  Rows are exact after any number of iterations, columns sum to n_valid / m_valid at
  convergence. Works under jit, vmap and grad (through the unrolled iterations), with
  `"ott"` in reverse mode only.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; the mask is the outer
      product of valid queries and valid keys.
    iterations: full Sinkhorn iterations, each g from f and then f from g.
    implementation: `"ott"` is OTT-JAX's algorithm in the log domain, with an exact
      gradient whose memory does not grow with `iterations`: for training. The others
      are the same plan several times faster: for inference. `"xla"` forms n x m
      kernels, `"chunked"` and `"cudnn"` take O(n + m) memory. Where the weights are
      sown or dropped they are formed, whichever is named.

  Returns:
    `[batch..., n, heads, features]`, zero at invalid queries.

  Raises:
    ValueError: as `asap_jax.attention.AttentionFn`, and for `iterations` below one or
      an `implementation` that is unknown or cannot serve.

  Example:
    >>> import functools, jax
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...   num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...   attention_fn=functools.partial(sinkhorn_attention, iterations=3))
    >>> layer(jax.random.normal(jax.random.key(0), (2, 6, 8))).shape
    (2, 6, 8)
  """
  if implementation not in ("ott", *get_args(Implementation)):
    raise ValueError(
      f"implementation={implementation!r}: expected 'ott', 'xla', 'chunked' or 'cudnn'"
    )
  if implementation == "ott":
    duals = sinkhorn_duals(inputs.logits, iterations, *inputs.masks)
    return inputs.attend(plan(inputs.logits, duals, *inputs.masks))
  start = jnp.zeros(inputs.query.shape[:-1], inputs.query.dtype)
  return inputs.attend(ClosedPlan(inputs, start, iterations, None, implementation))


@attention_fn
def asap_attention(
  inputs: Inputs,
  *,
  dual_map: DualMap,
  implementation: Implementation | None = None,
) -> Array:
  """Compiled doubly stochastic attention: a predicted dual and its closures.

  (Tran, Milkert and Hyde, 2026, arXiv 2605.12879.) Rows are exact, columns as good as
  the dual map. Works under jit, vmap and grad, in the leaves of `dual_map` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, `scale` and `epsilon`
      those of the teacher; the mask is the outer product of valid queries and valid
      keys. The closure sees a bias, the features of the dual map do not.
    dual_map: calibrated parameters, one set per head.
    implementation: of the closures and the product with the values, `"xla"`,
      `"chunked"` or `"cudnn"`; `None` takes the best for device, dtype and shape. Where
      the weights are sown or dropped they are formed, whichever is named.

  Returns:
    `[batch..., n, heads, features]`, zero at invalid queries.

  Raises:
    ValueError: as `asap_jax.attention.AttentionFn`, and if `dual_map` does not fit the
      heads.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> dual_map = DualMap(jnp.ones((4, 1, 8)), jnp.zeros((4, 8)), features=("query",))
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> asap_attention(tokens, tokens, tokens, dual_map=dual_map).shape
    (2, 6, 4, 8)
  """
  check_heads(dual_map, inputs)
  f = predict_dual(dual_map, inputs.query, inputs.key, *inputs.masks)
  closed = ClosedPlan(
    inputs, f, dual_map.closures, dual_map.relaxation, implementation, dual_map
  )
  return inputs.attend(closed)


def check_heads(dual_map: DualMap, inputs: Inputs) -> None:
  """Raises ValueError unless a map was calibrated for heads like these."""
  heads, _, dim = dual_map.directions.shape
  if (heads, dim) != (inputs.query.shape[-3], inputs.query.shape[-1]):
    raise ValueError(
      f"dual_map was calibrated for {heads} heads of dimension {dim}: got "
      f"{inputs.query.shape[-3]} heads of dimension {inputs.query.shape[-1]}"
    )
