"""Doubly stochastic attention whose sequences are spread over devices.

For long sequences: each device holds some queries and some keys, and the logits of
those alone. A half-iteration is then one log-sum-exp of what the devices have, one
number a token: two reductions a closure, 2T in T iterations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.attention.functions import check_iterations
from asap_jax.attention.inputs import Activation, prepare
from asap_jax.attention.meshes import Attended, on_mesh
from asap_jax.c_transform.entropic import LOG_ZERO, advance, by_closure, check_closures
from asap_jax.dual_map.predict import DualMap, Steps, predict_dual
from asap_jax.masses import Side, zero_invalid
from asap_jax.numerics import float_dtype, varying_as
from asap_jax.teacher.starts import Start, starting_dual


def sequence_sharded_attention(
  query: Float[Array, "*batch n heads dim"],
  key: Float[Array, "*batch m heads dim"],
  value: Float[Array, "*batch m heads features"],
  *,
  iterations: int = 20,
  start: Start = "zero",
  dual_map: DualMap | None = None,
  query_axis: str | None = None,
  key_axis: str | None = None,
  query_valid: Bool[Array, "*batch n"] | None = None,
  key_valid: Bool[Array, "*batch m"] | None = None,
  scale: float | None = None,
  epsilon: float | Array = 1.0,
) -> Float[Array, "*batch n heads features"]:
  r"""Sinkhorn attention, or a compiled one, inside of `jax.shard_map`.

  The same values and gradients as `asap_jax.sinkhorn_attention` and
  `asap_jax.asap_attention` have of whole sequences. Each device works on its own n
  queries and m keys, in $O(nm + T(n + m))$ memory, the backward pass too, which
  computes each iteration anew; in the log domain, with two exponentials of a pair an
  iteration. A Gaussian start and a dual map see all tokens, which are gathered once,
  without their values. Works under jit, vmap and grad; `jax.shard_map` has to check
  what varies, as it does by default.

  Args:
    query: of this device, as `asap_jax.attention.AttentionFn` takes them.
    key: likewise.
    value: likewise.
    iterations: full iterations; see `asap_jax.sinkhorn_attention`.
    start: likewise.
    dual_map: its prediction and its closures in the place of iterations.
    query_axis: name of the mesh axis that queries are spread over, in order; `None`
      where each device has all of them.
    key_axis: likewise of the keys, another axis than that.
    query_valid: queries that are no padding; all by default.
    key_valid: likewise.
    scale: of the logits, 1 / sqrt(dim) by default.
    epsilon: the logits are divided by it.

  Returns:
    `[batch..., n, heads, features]` of this device's queries.

  Raises:
    ValueError: if both axes are one, and as the functions named above.

  Example:
    >>> import functools, jax
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("keys",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> attend = functools.partial(
    ...   sequence_sharded_attention, iterations=2, key_axis="keys")
    >>> spread = jax.shard_map(
    ...   attend, mesh=mesh, in_specs=(P(), P(None, "keys"), P(None, "keys")),
    ...   out_specs=P())
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> jax.jit(spread)(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """
  if query_axis is not None and query_axis == key_axis:
    raise ValueError(
      f"query_axis={query_axis!r} and key_axis={key_axis!r}: expected two axes, for "
      "each device needs the logits of its queries with all devices' keys"
    )
  inputs = prepare(query, key, value, scale=scale, epsilon=epsilon)
  valid = tuple(
    None if each is None else each[..., None, :] for each in (query_valid, key_valid)
  )
  seen = Activation(
    zero_invalid(inputs.query, valid[0], axis=-2),
    zero_invalid(inputs.key, valid[1], axis=-2),
    query_mask=valid[0],
    key_mask=valid[1],
    precision=inputs.precision,
  )
  axes = query_axis, key_axis
  if dual_map is None:
    check_iterations(iterations, start)
    steps = Steps(relaxation=None, momentum=None, side="query" if iterations else "key")
    named = functools.partial(starting_dual, start, side=steps["side"])
    if start == "zero":
      dual = named(seen.query, seen.key)
    else:
      dual = _of_all(lambda _, *tokens: named(*tokens), None, seen, axes, steps["side"])
  else:
    iterations, steps = dual_map.closures, dual_map.steps
    dual = _of_all(predict_dual, dual_map, seen, axes, steps["side"])
  check_closures(iterations, **steps)
  value = zero_invalid(inputs.value, valid[1], axis=-2)
  out = _closed_values(seen, value, dual, iterations, steps, axes)
  return jnp.moveaxis(out.astype(inputs.value.dtype), -3, -2)


def _closed_values(
  seen: Activation,
  value: Array,
  dual: Array,
  count: int,
  steps: Steps,
  axes: tuple[str | None, str | None],
) -> Array:
  """Values under the plan of `count` closures of a dual, of this device's queries."""
  dtype = float_dtype(seen.query, dual)
  present = tuple(
    jnp.ones(points.shape[-2], bool) if mask is None else mask
    for points, mask in zip((seen.query, seen.key), seen.masks, strict=True)
  )
  n, m = (
    _sum_over(axis, each.sum(-1, keepdims=True).astype(dtype))
    for each, axis in zip(present, axes, strict=True)
  )
  log_columns = jnp.log(jnp.maximum(n, 1.0)) - jnp.log(jnp.maximum(m, 1.0))

  def transform(dual: Array, to: Side) -> Array:
    """One half-iteration: a log-sum-exp over this device's points, then over all."""
    here, there, axis, log_sum = (
      (present[1], present[0], axes[0], log_columns)
      if to == "key"
      else (present[0], present[1], axes[1], 0.0)
    )
    dual = jnp.where(there, dual, LOG_ZERO)
    scores = seen.products + (dual[..., None] if to == "key" else dual[..., None, :])
    own = jax.nn.logsumexp(scores, axis=-2 if to == "key" else -1)
    if axis is not None:
      own = jax.nn.logsumexp(jax.lax.all_gather(own, axis), axis=0)
    return jnp.where(here, log_sum - own, 0.0)

  # The backward pass computes the scores anew: nothing of a pair is kept.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def closed(f: Array) -> Array:
    return transform(transform(f, "key"), "query")

  def step(carry: tuple[Array, Array], factors: Any) -> tuple[Any, None]:
    f, before = carry
    return (advance(before, f, closed(f), *factors), f), None

  f = g = dual
  if steps["side"] == "key":
    f = transform(g, "query")
  if count > 1:
    factors = by_closure(steps["relaxation"], steps["momentum"], dtype)
    # A loop takes what it returns, types included.
    f = varying_as(f, seen.query, seen.key)
    (f, _), _ = jax.lax.scan(step, (f, f), factors, length=count - 1)
  if count > 0:
    g = transform(f, "key")
    f = transform(g, "query")

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def values(f: Array, g: Array, value: Array) -> Array:
    scores = seen.products + jnp.where(present[1], g, LOG_ZERO)[..., None, :]
    plan = jnp.exp(scores + f[..., None])
    return jnp.einsum(
      "...nm,...mv->...nv",
      plan.astype(jnp.promote_types(value.dtype, jnp.float32)),
      value,
      precision=seen.precision,
      preferred_element_type=plan.dtype,
    )

  out = _sum_over(axes[1], values(f, g, value))
  return jnp.where(present[0][..., None], out, 0.0)


def _sum_over(axis: str | None, array: Array) -> Array:
  return array if axis is None else jax.lax.psum(array, axis)


def _of_all(
  function: Callable[..., Array],
  dual_map: DualMap | None,
  seen: Activation,
  axes: tuple[str | None, str | None],
  side: Side,
) -> Array:
  """This device's part of a dual: a function of a map and of all tokens."""

  def gathered(array: Array | None, axis: str | None, at: int) -> Array | None:
    if array is None or axis is None:
      return array
    return jax.lax.all_gather(array, axis, axis=array.ndim + at, tiled=True)

  query, key = (
    gathered(points, axis, -2)
    for points, axis in zip((seen.query, seen.key), axes, strict=True)
  )
  masks = [
    gathered(mask, axis, -1) for mask, axis in zip(seen.masks, axes, strict=True)
  ]
  arguments = {"map": dual_map, "query": query, "key": key, "masks": masks}

  def whole(given: dict[str, Any]) -> Attended:
    tokens = given["query"], given["key"], *given["masks"]
    return Attended(function(given["map"], *tokens))

  dual = on_mesh(whole, arguments | {"value": query}).values
  axis, own = (axes[0], seen.query) if side == "query" else (axes[1], seen.key)
  if axis is None:
    return dual
  size = own.shape[-2]
  first = size * jax.lax.axis_index(axis)
  return jax.lax.dynamic_slice_in_dim(dual, first, size, axis=-1)
