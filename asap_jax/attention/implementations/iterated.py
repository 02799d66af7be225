"""Sinkhorn's iterations with their exact gradient, at a price near that of softmax.

The forward pass keeps the duals of all iterations and no matrix; the backward pass
forms the kernel anew, goes back through the iterations by two matrix-vector products
each, and ends in one product of rank 2T (`asap_jax.teacher.gradient`). On a CPU both
work in blocks that stay in the cache. On 2 CPU cores (JAX 0.10.2, float32) a training
step of 20 iterations takes 1.4 to 2.4 times that of the fastest softmax, where OTT-JAX
forward takes 3.9 to 6.2 times.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.implementations.blocks import in_cache
from asap_jax.attention.implementations.xla import logits_of, scaled_attention
from asap_jax.c_transform.entropic import Duals, marginals, plan
from asap_jax.c_transform.iterates import Iterates, scaled_iterates
from asap_jax.c_transform.segments import Segments
from asap_jax.masses import Masses, valid_pairs, zero_invalid
from asap_jax.numerics import logits_einsum, with_usual_promotion
from asap_jax.sizes import Size
from asap_jax.teacher.gradient import (
  Iterations,
  by_domain,
  cotangents,
  in_range,
)
from asap_jax.teacher.starts import Start, starting_dual

# Of queries, keys, values, dual, masses of both, bias, and segments of both: axes
# behind those of the batch.
_OWN = 2, 2, 2, 1, 1, 1, 2, 1, 1
# Of a block: more than one matrix of 512 tokens gains nothing, and takes memory.
_PAIRS = 2**18


class _Options(NamedTuple):
  """What is static: see `iterated_attention`; `start` is a name, or `None`."""

  iterations: int
  tolerance: float | None
  precision: jax.lax.PrecisionLike
  start: Start | None

  def starting(self, start: Array | None, *tokens: Any) -> Array:
    """The dual to start at: the one that is given, or that of the name."""
    if self.start is None:
      assert start is not None
      return start
    return starting_dual(self.start, *tokens)


def iterated_attention(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  value: Float[Array, "*batch m features"],
  start: Float[Array, "*batch n"] | Start,
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  bias: Float[Array, "..."] | None = None,
  segments: Segments | None = None,
  precision: jax.lax.PrecisionLike = None,
  tolerance: float | None = None,
  forward: Float[Array, "*batch n features"] | None = None,
) -> Float[Array, "*batch n features"]:
  """Values weighted by the plan of plain iterations from a query-side dual.

  The same as `scaled_attention`. Works under jit, vmap and grad, in reverse mode only.

  Args:
    query: see `scaled_attention`, as all arguments not listed here; absent tokens may
      hold anything.
    key: likewise.
    value: likewise.
    start: query-side dual, anything at absent queries; or the name of one
      (`asap_jax.teacher.starts`), which is computed block by block, its gradient too:
      of 192 heads of 64 tokens on 2 CPU cores a step of two iterations from the
      Gaussian start takes 17 instead of 27 ms.
    iterations: at least one; with a tolerance at most so many.
    query_weights: likewise.
    key_weights: likewise.
    bias: likewise.
    segments: likewise; they need a dual that is given.
    precision: likewise.
    tolerance: see `asap_jax.c_transform.iterates.scaled_iterates`.
    forward: the result, if it is computed elsewhere; it is not differentiated.

  Returns:
    As `scaled_attention`.
  """
  name = start if isinstance(start, str) else None
  dual = None if name else start
  weights = query_weights, key_weights
  inputs = _arguments(query, key, value, dual, *weights, bias, segments)
  options = _Options(iterations, tolerance, precision, name)
  return _attend(options, forward, *inputs)


def iterated_plan(
  logits: Float[Array, "*batch n m"],
  start: Float[Array, "*batch n"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  tolerance: float | None = None,
) -> Float[Array, "*batch n m"]:
  """The plan itself, with the same gradient, in memory that `iterations` leave alone.

  Works under jit, vmap and grad, in reverse mode only.
  """
  batch, (n, m) = logits.shape[:-2], logits.shape[-2:]
  weights = _masses(query_weights, batch, n), _masses(key_weights, batch, m)
  pairs = valid_pairs(*weights)
  if pairs is not None:
    logits = jnp.where(pairs, logits, 0.0)
  start = zero_invalid(start, weights[0])
  return _plan(iterations, tolerance, logits, start, *weights)


def iterated_duals(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  start: Float[Array, "*batch n"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  bias: Float[Array, "..."] | None = None,
  segments: Segments | None = None,
  precision: jax.lax.PrecisionLike = None,
) -> Duals:
  """The last duals of plain iterations, for which no gradient is defined.

  Arguments are those of `iterated_attention`. Works under jit and vmap.
  """
  weights = query_weights, key_weights
  arguments = _arguments(query, key, key, start, *weights, bias, segments)

  def block(query, key, _, start, rows, columns, *pairs):
    logits = logits_of(query, key, pairs, precision)
    return scaled_iterates(logits, start, iterations, rows, columns)[0].duals

  arguments = jax.lax.stop_gradient(arguments)
  return _in_blocks(block, arguments, _OWN)


def _arguments(query, key, value, start, query_weights, key_weights, bias, segments):
  """What blocks are made of: masks as masses, and absent points and pairs zero."""
  batch, n, m = query.shape[:-2], query.shape[-2], key.shape[-2]
  weights = _masses(query_weights, batch, n), _masses(key_weights, batch, m)
  if bias is not None:
    bias = jnp.broadcast_to(bias, (*batch, n, m))
    pairs = valid_pairs(*weights)
    if pairs is not None:
      bias = jnp.where(pairs, bias, 0.0)
  query, key, value = (
    zero_invalid(tokens, own, axis=-2)
    for tokens, own in ((query, weights[0]), (key, weights[1]), (value, weights[1]))
  )
  if start is not None:
    start = zero_invalid(start, weights[0])
  return query, key, value, start, *weights, bias, *(segments or (None, None))


def _masses(weights: Masses, batch: Sequence[Size], size: Size) -> Masses:
  """Masks as masses, which have cotangents, of every element of the batch."""
  if weights is None:
    return None
  floats = weights.astype(jnp.float32) if weights.dtype == jnp.bool_ else weights
  return jnp.broadcast_to(floats, (*batch, size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, forward, *arguments):
  if forward is not None:
    return forward
  if options.tolerance is not None:
    return _attend_and_keep(options, *arguments)[0].astype(arguments[2].dtype)

  def attend(query, key, value, start, rows, columns, bias, *segments):
    start = options.starting(start, query, key, rows, columns)
    given: dict[str, Any] = {"bias": bias, "precision": options.precision}
    given["segments"] = None if segments[0] is None else Segments(*segments)
    return scaled_attention(
      query, key, value, start, options.iterations, rows, columns, **given
    )

  if options.start is None:
    return attend(*arguments)
  return _in_blocks(attend, arguments, _OWN)


def _attend_and_keep(options, *arguments):
  """The result, the duals at last and those of all iterations, which come last."""
  iterations, tolerance, precision, _ = options

  def block(query, key, value, start, rows, columns, *pairs):
    logits = logits_of(query, key, pairs, precision)
    start = options.starting(start, query, key, rows, columns)
    scaled, iterates = scaled_iterates(
      logits, start, iterations, rows, columns, tolerance=tolerance
    )
    # Wide: the cotangent of the duals is read off the result.
    wide = value.astype(scaled.kernel.dtype)
    out = scaled.apply(wide, precision=precision)
    # Blocks have the batch in front.
    return out, scaled.duals, jax.tree.map(_iterations_last, iterates)

  return _in_blocks(block, arguments, _OWN)


def _attend_forward(options, forward, *arguments):
  del forward
  kept = _attend_and_keep(options, *arguments)
  # JAX (0.10) mixes up residuals that are inputs where it differentiates a loop twice.
  kept_apart = jax.lax.optimization_barrier((arguments, kept))
  return kept[0].astype(arguments[2].dtype), kept_apart


@with_usual_promotion
def _attend_backward(options, residuals, out_bar):
  def block(query, key, value, rows, columns, *rest):
    *pairs, out, f, g, fs, gs, active, out_bar = rest
    shape = *query.shape[:-1], key.shape[-2]
    sums = functools.partial(marginals, shape=shape, dtype=f.dtype)
    of_plan, to_weights = jax.vjp(sums, rows, columns)
    duals = Duals(f, g)
    iterates = jax.tree.map(_iterations_first, Iterates(fs, gs, active))
    wide, out_bar = (x.astype(out.dtype) for x in (value, out_bar))
    passed = *of_plan, duals, iterates
    given = query, key, wide, pairs, out, out_bar
    function = functools.partial(_block_cotangents, options.precision)
    of_query, of_key, of_value, of_start, a, b, of_bias = by_domain(
      function, in_range(*passed), passed, given
    )
    of_tokens = of_query, of_key, *to_weights((a, b))
    if options.start is not None:
      tokens = query, key, rows, columns
      start, to_tokens = jax.vjp(functools.partial(options.starting, None), *tokens)
      more = to_tokens(of_start.astype(start.dtype))
      of_tokens = jax.tree.map(jnp.add, of_tokens, more)
      of_start = None
    of_query, of_key, of_rows, of_columns = of_tokens
    return of_query, of_key, of_value, of_start, of_rows, of_columns, of_bias

  arguments, (out, duals, iterates) = residuals
  query, key, value, _, *rest = arguments
  given = query, key, value, *rest, out, *duals, *iterates, out_bar
  own = (*_OWN[:3], *_OWN[4:], 2, 1, 1, 2, 2, 2, 2)
  found = _in_blocks(block, given, own)
  *moving, _, _ = arguments
  bars = [
    None if bar is None else bar.astype(argument.dtype)
    for bar, argument in zip(found, moving, strict=True)
  ]
  return None, *bars, None, None  # segments are none that moves


def _block_cotangents(precision, domain, passed, given):
  """Of queries, keys, values, start, sums of rows and of columns, and bias."""
  query, key, value, pairs, out, out_bar = given
  # Products with cotangents of logits are as exact as those that make logits.
  to_tokens = functools.partial(logits_einsum, precision=precision)
  iterations = Iterations(logits_of(query, key, pairs, precision), *passed)
  value_bar = jnp.einsum(
    "...nm,...nv->...mv", iterations.plan(), out_bar, precision=precision
  )
  # Sums of the plan times its cotangent, without that.
  bars = Duals((out_bar * out).sum(-1), (value * value_bar).sum(-1))
  found = iterations.cotangents(domain, bars, (out_bar, value))
  return (
    to_tokens("...nm,...md->...nd", found.logits, key),
    to_tokens("...nm,...nd->...md", found.logits, query),
    value_bar,
    found.start,
    found.a,
    found.b,
    None if pairs[0] is None else found.logits,
  )


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _plan(iterations, tolerance, logits, start, *weights):
  options: dict[str, Any] = {"tolerance": tolerance}
  return scaled_iterates(logits, start, iterations, *weights, **options)[0].dense()


def _plan_forward(iterations, tolerance, logits, start, *weights):
  options: dict[str, Any] = {"tolerance": tolerance}
  scaled, iterates = scaled_iterates(logits, start, iterations, *weights, **options)
  kept = (logits, start, *weights), scaled.duals, iterates
  return scaled.dense(), jax.lax.optimization_barrier(kept)


@with_usual_promotion
def _plan_backward(iterations, tolerance, residuals, plan_bar):
  (logits, _, *weights), duals, iterates = residuals
  sums = functools.partial(marginals, shape=logits.shape, dtype=logits.dtype)
  of_plan, to_weights = jax.vjp(sums, *weights)
  passed = Iterations(logits, *of_plan, duals, iterates)
  moved = plan(logits, duals, *weights) * plan_bar
  bars = Duals(moved.sum(-1), moved.sum(-2))
  found = by_domain(cotangents, in_range(*passed[1:]), passed, bars)
  return found.logits + moved, found.start, *to_weights((found.a, found.b))


_plan.defvjp(_plan_forward, _plan_backward)


def _in_blocks(function, arguments, own):
  query, key = arguments[:2]
  pairs = query.shape[-2] * key.shape[-2]
  return in_cache(function, query.shape[:-2], pairs, arguments, own, _PAIRS)


def _iterations_last(array: Array) -> Array:
  return jnp.moveaxis(array, 0, -2)


def _iterations_first(array: Array) -> Array:
  return jnp.moveaxis(array, -2, 0)
