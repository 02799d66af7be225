"""Sinkhorn's algorithm from OTT-JAX, for a fixed number of iterations: the teacher.

A full iteration is g from f, then f from g, started at f = 0; some papers count the
two halves. One iteration from f = 0 is not softmax: softmax is the second half alone.

OTT-JAX is imported where it runs, so that compiled models are served without it.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import Duals, closure
from asap_jax.c_transform.iterates import scaled_iterates
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.masses import (
  Masses,
  check_dual,
  check_weights,
  normalised,
  valid,
  valid_pairs,
  zero_invalid,
)
from asap_jax.numerics import float_dtype, with_usual_promotion
from asap_jax.teacher.gradient import Iterations, by_domain, cotangents, in_range


def sinkhorn_duals(
  logits: Float[Array, "*batch n m"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  init: Float[Array, "..."] | None = None,
  *,
  implementation: Literal["ott", "xla"] = "ott",
) -> Duals:
  """Duals after a fixed number of full Sinkhorn iterations (OTT-JAX, log domain).

  Works under jit, vmap and grad: reverse mode gives the exact gradient of all the
  iterations, converged or not, in memory that does not grow with their number; it is
  zero at absent points. Forward mode (`jax.jvp`) is not supported.

  Args:
    logits: S, `[..., n, m]`.
    iterations: full iterations, at least one.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    init: query-side dual to start at, `[..., n]`; zero by default.
    implementation: `"ott"`, the reference; or `"xla"`, the same iterations in the
      scaling domain, several times faster.

  Returns:
    `Duals` in this package's convention (see `c_transform`): rows of the plan are
    exact, all remaining error is in its columns.

  Raises:
    ValueError: if `iterations` is below one, weights or `init` do not fit the logits,
      or the `implementation` is unknown.

  Example:
    >>> duals = sinkhorn_duals(jnp.zeros((3, 3)), 20)
    >>> (3 * jnp.exp(duals.f + duals.g)).round(3).tolist()
    [1.0, 1.0, 1.0]
  """
  if iterations < 1:
    raise ValueError(f"iterations={iterations}: expected at least one full iteration")
  if implementation not in ("ott", "xla"):
    raise ValueError(f"implementation={implementation!r}: expected 'ott' or 'xla'")
  n, m = logits.shape[-2:]
  check_weights("query_weights", query_weights, n)
  check_weights("key_weights", key_weights, m)
  if init is not None:
    check_dual("init", init, n)
  batch = logits.shape[:-2]
  dtype = float_dtype(logits)
  pairs = valid_pairs(query_weights, key_weights)
  logits = logits.astype(dtype)
  if pairs is not None:
    logits = jnp.where(pairs, logits, 0.0)
  a, b = normalised(query_weights, n), normalised(key_weights, m)
  f = jnp.zeros((n,), dtype) if init is None else init.astype(dtype)
  # Masses are float32 where logits may be float64, and OTT-JAX promotes nothing.
  f, a = (jnp.broadcast_to(array.astype(dtype), (*batch, n)) for array in (f, a))
  b = jnp.broadcast_to(b.astype(dtype), (*batch, m))

  f, g = _iterate(iterations, implementation == "ott", logits, a, b, f)
  # OTT's plan sums to one, ours to the number of valid queries.
  mask = valid(query_weights)
  count = n if mask is None else mask.sum(-1, keepdims=True)
  return Duals(
    zero_invalid(f, query_weights),
    zero_invalid(g + jnp.log(jnp.maximum(count, 1).astype(dtype)), key_weights),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _iterate(
  iterations: int, by_ott: bool, logits: Array, a: Array, b: Array, start: Array
) -> tuple[Array, Array]:
  """Duals of masses a `[..., n]` and b `[..., m]`, in OTT's convention.

  The gradient is not OTT's: implicit gradients are NaN at zero weights and assume
  convergence, and unrolled ones (OTT 0.6) are wrong over several blocks of iterations.
  """
  if not by_ott:
    return _scaled(iterations, logits, a, b, start)[0]
  from ott.geometry import geometry
  from ott.problems.linear import linear_problem
  from ott.solvers.linear import sinkhorn as ott_sinkhorn

  # Blocks of one iteration: OTT's default of ten would round other counts.
  solver = ott_sinkhorn.Sinkhorn(
    inner_iterations=1,
    min_iterations=iterations,
    max_iterations=iterations,
    threshold=0.0,
    implicit_diff=None,
  )

  def solve(logits, a, b, start):
    problem = linear_problem.LinearProblem(
      geometry.Geometry(cost_matrix=-logits, epsilon=1.0), a=a, b=b
    )
    # An absent query takes no part in the first sum either.
    start = jnp.where(a > 0, start, -jnp.inf)
    output = solver(problem, init=(start, jnp.zeros_like(b)))
    return output.f, output.g

  for _ in logits.shape[:-2]:
    solve = jax.vmap(solve)
  return solve(logits, a, b, start)


def _scaled(iterations, logits, a, b, start):
  """The same in the scaling domain, where plans sum to the number of queries."""
  scaled, iterates = scaled_iterates(logits, start, iterations, a, b)
  count = jnp.log(jnp.maximum((a > 0).sum(-1, keepdims=True), 1).astype(a.dtype))
  duals = scaled.duals._replace(g=scaled.duals.g - count)
  return duals, iterates._replace(g=iterates.g - count)


def _iterate_forward(iterations, by_ott, *arguments):
  # JAX (0.10) mixes up residuals that are inputs where it differentiates a loop twice.
  found = _iterate(iterations, by_ott, *arguments)
  return found, jax.lax.optimization_barrier(arguments)


@with_usual_promotion
def _iterate_backward(iterations, by_ott, residuals, bars):
  del by_ott
  logits, a, b, _ = residuals
  passed = Iterations(logits, a, b, *_scaled(iterations, *residuals))
  return tuple(by_domain(cotangents, in_range(*passed[1:]), passed, Duals(*bars)))


_iterate.defvjp(_iterate_forward, _iterate_backward)


def sinkhorn_source_dual(
  logits: Float[Array, "*batch n m"],
  iterations: int,
  query_weights: Masses = None,
  key_weights: Masses = None,
  init: Float[Array, "..."] | None = None,
  *,
  relaxation: float = 1.0,
  tolerance: float | None = None,
) -> Float[Array, "*batch n"]:
  """The query-side dual that the last of `iterations` full iterations consumed.

  Closing it (`asap_jax.c_transform.closure`) gives back the plan of all `iterations`,
  converged or not: the target of calibration, computed in the scaling domain, which is
  several times faster than `sinkhorn_duals`. Works under jit, vmap and grad.

  Args:
    logits: S, `[..., n, m]`.
    iterations: full iterations, at least one.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    init: query-side dual to start at, `[..., n]`; zero by default.
    relaxation: omega between iterations, as in `asap_jax.closures`; with another than
      one they run in the log domain.
    tolerance: see `asap_jax.sinkhorn_attention`; the last iteration is that of each
      element of the batch.

  Returns:
    f, `[..., n]`, zero on absent queries; the start for a single iteration.

  Raises:
    ValueError: as in `sinkhorn_duals`.
  """
  if iterations < 1:
    raise ValueError(f"iterations={iterations}: expected at least one full iteration")
  check_weights("query_weights", query_weights, logits.shape[-2])
  check_weights("key_weights", key_weights, logits.shape[-1])
  dtype = float_dtype(logits)
  start = jnp.zeros((), dtype) if init is None else init.astype(dtype)
  start = jnp.broadcast_to(start, logits.shape[:-1])
  if iterations == 1:
    return zero_invalid(start, query_weights)
  if relaxation != 1.0:

    def step(f, _):
      closed = closure(logits, f, query_weights, key_weights).f
      return f + relaxation * (closed - f), None

    start = zero_invalid(start, query_weights)
    return jax.lax.scan(step, start, length=iterations - 1)[0]
  weights = query_weights, key_weights
  if tolerance is not None:
    pairs = valid_pairs(*weights)
    if pairs is not None:
      logits = jnp.where(pairs, logits, 0.0)
    _, (duals, _, active) = scaled_iterates(
      logits, start, iterations, *weights, tolerance=tolerance
    )
    assert active is not None
    last = active & ~jnp.concatenate([active[1:], jnp.zeros_like(active[:1])])
    return jnp.where(last, duals, 0.0).sum(0)
  return scaled_plan(logits, start, iterations - 1, *weights).duals.f
