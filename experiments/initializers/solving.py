"""Sinkhorn's iterations by OTT-JAX from a start, counted and timed."""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import costs, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from experiments.initializers.clouds import Clouds

MOST_ITERATIONS, REPEATS = 5000, 3
COSTS = {"squared": costs.SqEuclidean, "product": costs.NegDotProduct}


def problem_of(
  clouds: Clouds, epsilon: jax.Array, cost: str
) -> linear_problem.LinearProblem:
  x, y, a, b = map(jnp.asarray, clouds)
  cloud = pointcloud.PointCloud(x, y, COSTS[cost](), epsilon=epsilon)
  return linear_problem.LinearProblem(cloud, a=a, b=b)


@functools.partial(jax.jit, static_argnames="cost")
def started(clouds, start, epsilon, cost):
  """Query-side starts of all problems, one after the other."""
  return jax.lax.map(lambda one: start(problem_of(one, epsilon, cost), True)[0], clouds)


class Solved(NamedTuple):
  """Of each problem `[count]`.

  Attributes:
    iterations: until the tolerance.
    converged: whether it was reached.
    first_error: L1 error of the marginal after one iteration.
    rate: by which the error fell per iteration, over the second half of them.
  """

  iterations: jax.Array
  converged: jax.Array
  first_error: jax.Array
  rate: jax.Array


@functools.partial(jax.jit, static_argnames=("cost", "tolerance"))
def iterated(clouds, f, epsilon, cost, tolerance) -> Solved:
  """Sinkhorn from f on all problems, one after the other."""
  # Blocks of one: counts are exact.
  solver = sinkhorn.Sinkhorn(
    inner_iterations=1, max_iterations=MOST_ITERATIONS, threshold=tolerance
  )

  def one(problem):
    clouds, f = problem
    given = problem_of(clouds, epsilon, cost)
    out = solver(given, init=(f, jnp.where(clouds.b > 0, 0.0, -jnp.inf)))
    last = out.n_iters - 1
    middle = last // 2
    errors = jnp.asarray(out.errors)
    fell = errors[last] / errors[middle]
    rate = fell ** (1.0 / jnp.maximum(last - middle, 1))
    converged = jnp.asarray(out.converged)
    return Solved(jnp.asarray(out.n_iters), converged, errors[0], rate)

  return jax.lax.map(one, (clouds, f))


def solved(
  clouds: Clouds, start: Any, epsilon: float, cost: str, tolerance: float
) -> tuple[np.ndarray, dict[str, Any]]:
  """Iterations of each problem from one start, and their row.

  Milliseconds are per problem, of the start alone and with the iterations after it.
  """
  clouds = jax.tree.map(jnp.asarray, clouds)
  epsilon = jnp.float32(epsilon)
  f = jax.block_until_ready(started(clouds, start, epsilon, cost))
  found = jax.tree.map(np.asarray, iterated(clouds, f, epsilon, cost, tolerance))
  times = []
  for _ in range(REPEATS):
    begun = time.perf_counter()
    f = jax.block_until_ready(started(clouds, start, epsilon, cost))
    between = time.perf_counter()
    jax.block_until_ready(iterated(clouds, f, epsilon, cost, tolerance))
    times.append((between - begun, time.perf_counter() - begun))
  begin, whole = np.min(times, axis=0) * 1e3 / len(clouds.x)
  return found.iterations, {
    "iterations": float(found.iterations.mean()),
    "converged": float(found.converged.mean()),
    "first_error": float(found.first_error.mean()),
    "rate": float(found.rate.mean()),
    "start_ms": float(begin),
    "milliseconds": float(whole),
  }
