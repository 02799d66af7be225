"""Doubly stochastic attention from a query-side dual, without forming the plan.

On a CPU memory takes most of the time of one large kernel, so that none is formed. Few
closures of short sequences are one expression in the log domain
(`asap_jax.attention.implementations.xla_short`). The batch of longer ones is worked off
in blocks whose kernels stay in the cache, in the scaling domain
(`asap_jax.c_transform.scaling_domain`). On other devices all of it is one block.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations.xla_short import closed_values
from asap_jax.c_transform.entropic import check_closures
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.masses import Weights

# Pairs of tokens in a block on a CPU: 4 MiB of float32.
_BLOCK = 2**20
# And of a head, and closures, up to which XLA makes one loop over the heads.
_SHORT = 2**16
_FEW = 3


def scaled_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  f: Float[Array, "*batch n"] | Callable[..., Array],
  count: int = 1,
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  bias: Float[Array, "..."] | None = None,
  relaxation: Float[Array, "..."] | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of `count` closures from f, without forming the plan.

  The plan is that of `asap_jax.c_transform.closures` for S = query key^T + bias, so
  Sinkhorn cut to `count` iterations if f is zero. Works under jit, vmap and grad.

  Args:
    query: `[..., n, dim]`, carrying the scale of the logits.
    key: `[..., m, dim]`.
    value: `[..., m, features]`.
    f: query-side dual to start at, `[..., n]`; or what predicts it from query, key,
      their weights and, where they are at hand, `products`, and where it need not be
      centred, `centred=False`: `asap_jax.predict_dual`, bound to its dual map. The last
      axis of the batch is that of the heads then.
    count: closures, at least one.
    query_weights: `None`, mask or masses, broadcast to `[..., n]`.
    key_weights: likewise, to `[..., m]`; values of absent keys may hold anything.
    bias: added to the logits, broadcast to `[..., n, m]`.
    relaxation: see `closures`.
    precision: of the products with keys and values.

  Returns:
    `[..., n, features]` in the dtype of `value`, zero at absent queries.

  Raises:
    ValueError: as `closures`.
  """

  predict = f if callable(f) else None
  batch, pairs = query.shape[:-2], query.shape[-2] * key.shape[-2]

  def products_of(query, key):
    return jnp.einsum("...nd,...md->...nm", query, key, precision=precision)

  def logits_of(products):
    return products if bias is None else products + bias

  def at_once(query, key, value, query_weights, key_weights, relaxation, f):
    weights = query_weights, key_weights
    products = products_of(query, key)
    if f is None and predict is not None:
      # The closure takes a constant back; to centre would end XLA's loop.
      f = predict(query, key, *weights, products=products, centred=False)
    logits = logits_of(products)
    return closed_values(logits, f, value, count, relaxation, *weights, precision)

  def attend(query, key, value, query_weights, key_weights, relaxation, f):
    weights = query_weights, key_weights

    def again(after):
      queries, keys, _ = jax.lax.optimization_barrier(
        (*jax.lax.stop_gradient((query, key)), after)
      )
      return logits_of(products_of(queries, keys))

    products = products_of(query, key)
    # For one closure XLA forms the kernel at once on a CPU, if nothing else needs the
    # products. Over more, sharp logits are needed time and again: they are kept.
    kept = {} if count == 1 else {"products": products}
    if f is None and predict is not None:
      f = predict(query, key, *weights, **kept)
    anew = again if count == 1 else None
    plan = scaled_plan(
      logits_of(products), f, count, *weights, relaxation=relaxation, again=anew
    )
    return plan.apply(value, key_weights, precision=precision)

  def by_blocks(*arguments):
    *given, f = arguments
    if predict is None:
      return _by_blocks(attend, batch, 0, pairs, arguments)
    if math.prod(batch[-1:]) * pairs <= _BLOCK:
      return _by_blocks(attend, batch[:-1], 1, math.prod(batch[-1:]) * pairs, arguments)
    # A block holds a part of the heads, but what predicts has them all.
    f = predict(*given[:2], *given[3:5])
    return _by_blocks(attend, batch, 0, pairs, (*given, f))

  start = None if predict else f
  arguments = query, key, value, query_weights, key_weights, relaxation, start
  check_closures(count, relaxation)
  if count <= _FEW and pairs <= _SHORT:
    return jax.lax.platform_dependent(*arguments, cpu=at_once, default=attend)
  if bias is not None or math.prod(batch) * pairs <= _BLOCK:
    return attend(*arguments)
  return jax.lax.platform_dependent(*arguments, cpu=by_blocks, default=attend)


def _by_blocks(
  function: Callable[..., Array],
  leading: Sequence[int],
  kept: int,
  pairs: int,
  arguments: Sequence[Array | None],
) -> Array:
  """`function` of some elements at a time of the axes `leading`.

  Args:
    function: of arguments with one leading axis instead.
    leading: the leading axes that the arguments have, up to broadcasting.
    kept: how many of the batch's axes come behind those.
    pairs: of tokens in an element.
    arguments: as `attend` in `scaled_attention` takes them.
  """
  total = math.prod(leading)
  # Blocks of one size, lest the remainder be compiled by itself.
  most = min(max(_BLOCK // pairs, 1), total)
  size = next(s for s in range(most, 0, -1) if total % s == 0)

  def split(array, own):
    own += kept
    array = array.reshape((1,) * (own - array.ndim) + array.shape)
    array = jnp.broadcast_to(array, (*leading, *array.shape[array.ndim - own :]))
    return array.reshape(-1, size, *array.shape[len(leading) :])

  blocks = [
    None if array is None else split(array, own)
    for array, own in zip(arguments, (2, 2, 2, 1, 1, 1, 1), strict=True)
  ]
  out = jax.lax.map(lambda block: function(*block), blocks)
  return out.reshape(*leading, *out.shape[2:])
