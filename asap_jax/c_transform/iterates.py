"""Plain closures whose way is kept: the duals of every Sinkhorn iteration.

They are what a gradient needs (`asap_jax.teacher.gradient`), and what tells when to
stop: the sums of the columns before an iteration are known once its first half is done.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.c_transform.entropic import Duals, check_closures, closure
from asap_jax.c_transform.half_closure import begin, fast_first
from asap_jax.c_transform.scaling_domain import ScaledPlan, in_log_domain
from asap_jax.masses import Masses, zero_invalid
from asap_jax.numerics import with_usual_promotion


class Iterates(NamedTuple):
  """Duals on the way to those of a plan, one of each for every closure.

  Attributes:
    f: that a closure started at, `[count, ..., n]`.
    g: that it computed, `[count, ..., m]`.
    active: closures that were run, `[count, ..., 1]`; those after them left the duals
      as they were. `None` if all were.
  """

  f: Float[Array, "count *batch n"]
  g: Float[Array, "count *batch m"]
  active: Bool[Array, "count *batch 1"] | None = None


def scaled_iterates(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  count: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  *,
  tolerance: float | None = None,
) -> tuple[ScaledPlan, Iterates]:
  """The plan of plain closures from f, and the duals that they went through.

  Works under jit, vmap and grad, in reverse mode only; logits at absent points are
  finite.

  Args:
    logits: S, `[..., n, m]`.
    f: to start at, `[..., n]`.
    count: closures.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    tolerance: error of the columns (`column_shift`) at which an element of the batch
      stops, with one closure at the least; `None` to run all of them.
  """
  check_closures(count, None, None, "query")
  return _iterates(count, tolerance, logits, f, query_weights, key_weights)


def column_shift(before: Array, after: Array, columns: Array) -> Array:
  """Error of the columns of a plan, from how far g moves when it is fitted to them.

  Its column sums are $b_j exp(g_j - g'_j)$; the error is their distance to b, summed,
  relative to the sum of b.

  Args:
    before: g of the plan, `[..., m]`.
    after: g that gives the plan its column sums.
    columns: b, `[..., m]`, zero at absent keys.

  Returns:
    `[...]`.
  """
  moved = jnp.abs(jnp.expm1(jnp.where(columns > 0, before - after, 0.0)))
  total = columns.sum(-1)
  return (columns * moved).sum(-1) / jnp.where(total > 0, total, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _iterates(count, tolerance, *arguments):
  return fast_first(functools.partial(_run, count, tolerance), *arguments)


def _run(count, tolerance, guarded, logits, f, *weights):
  (kernel, queries, keys), half = begin(logits, f, *weights, guarded=guarded)
  first = Iterates(queries.dual, keys.dual)
  kernel, keys, queries = half(kernel, keys, queries, axis=-1)

  def closed(kernel, queries, keys, active):
    f, g = queries.dual, keys.dual
    kernel, queries, keys = half(kernel, queries, keys, axis=-2)
    if tolerance is not None:
      error = column_shift(g, keys.dual, keys.marginal)[..., None]
      active = active & (error > tolerance)
      keys = keys.moved_to(jnp.where(active, keys.dual, g))
    passed = Iterates(f, keys.dual, active)
    kernel, keys, queries = half(kernel, keys, queries, axis=-1)
    return (kernel, queries, keys, active), passed

  def step(carry, _):
    if tolerance is None:
      return closed(*carry)
    _, queries, keys, active = carry
    passed = Iterates(queries.dual, keys.dual, active)
    return jax.lax.cond(active.any(), closed, lambda *_: (carry, passed), *carry)

  active = None
  if tolerance is not None:
    active = jnp.ones((*queries.dual.shape[:-1], 1), bool)
  first = first._replace(active=active)
  carry = kernel, queries, keys, active
  carry, later = jax.lax.scan(step, carry, length=count - 1)
  kernel, queries, keys, _ = carry
  iterates = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, later)
  duals = Duals(queries.dual, keys.dual)
  found = ScaledPlan(kernel, queries.scaling, keys.scaling, duals)
  return (found, iterates), queries.in_range


def _in_log_domain(count, active, logits, f, *weights):
  def step(carry, active):
    closed = closure(logits, carry.f, *weights)
    if active is not None:
      closed = jax.tree.map(functools.partial(jnp.where, active), closed, carry)
    return closed, Iterates(carry.f, closed.g, active)

  n, m = logits.shape[-2:]
  f = jnp.broadcast_to(zero_invalid(f, weights[0]), (*logits.shape[:-2], n))
  start = Duals(f, jnp.zeros((*logits.shape[:-2], m), f.dtype))
  duals, iterates = jax.lax.scan(step, start, active, length=count)
  return in_log_domain(logits, duals, *weights), iterates


def _iterates_forward(count, tolerance, *arguments):
  # Where the forward pass of a gradient is differentiated once more. JAX (0.10) mixes
  # up residuals that are inputs where it differentiates a loop twice.
  active = None
  if tolerance is not None:
    active = _iterates(count, tolerance, *arguments)[1].active
  kept = jax.lax.optimization_barrier((active, arguments))
  return _in_log_domain(count, active, *arguments), kept


@with_usual_promotion
def _iterates_backward(count, tolerance, kept, cotangents):
  active, arguments = kept
  iterate = functools.partial(_in_log_domain, count, active)
  return jax.vjp(iterate, *arguments)[1](cotangents)


_iterates.defvjp(_iterates_forward, _iterates_backward)
