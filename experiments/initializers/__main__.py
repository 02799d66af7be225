"""Where to start Sinkhorn's algorithm: sliced potentials against OTT-JAX's starts.

python -m experiments.initializers --out DIR
"""

import argparse
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ott.geometry import costs, pointcloud
from ott.initializers.linear import initializers
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from asap_jax import DualMap, SlicedDualInitializer
from asap_jax.compiler.fitting.objective import (
  fit_by_objective,
  fit_by_regression,
  unsliced_map,
)
from asap_jax.compiler.sites import Activation
from asap_jax.dual_map.features import KINDS
from asap_jax.potentials import directions as slices
from experiments.common.results import new_directory, print_rows, write_results
from experiments.initializers.clouds import FAMILIES, Clouds, Family

TOLERANCE, MOST_ITERATIONS, REPEATS = 1e-3, 5000, 3
SLICES, HIDDEN, BATCH, TEACHER_ITERATIONS = 16, 32, 32, 1000
COSTS = {"squared": costs.SqEuclidean, "product": costs.NegDotProduct}


@jax.tree_util.register_pytree_node_class
class GaussianInitializer(initializers.GaussianInitializer):
  """OTT-JAX's, for -<x, y> too: |x - y|^2 / 2 up to terms of one side."""

  def init_fu(self, ot_prob, lse_mode, rng=None):
    """See the base class."""
    geometry = ot_prob.geom
    f = super().init_fu(ot_prob, True, rng)
    if isinstance(geometry.cost_fn, costs.NegDotProduct):
      f = (f - jnp.sum(geometry.x**2, -1)) / 2
    return f if lse_mode else geometry.scaling_from_potential(f)


def main(arguments: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=new_directory, required=True, help="new directory")
  parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
  parser.add_argument("--points", type=int, default=128, help="of each cloud")
  parser.add_argument("--tests", type=int, default=16, help="fresh problems")
  parser.add_argument("--fitted", type=int, default=160, help="problems to learn from")
  parser.add_argument("--steps", type=int, default=200, help="0 for no learned maps")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(arguments)
  started, rows = time.perf_counter(), []
  for name in args.families:
    for epsilon in FAMILIES[name].epsilons:
      found = measure(FAMILIES[name], epsilon, args)
      print_rows(displayed(found), f"{name}, epsilon {epsilon:g}")
      rows += [{**row, "family": name} for row in found]
  config = {**vars(args), "out": str(args.out), "tolerance": TOLERANCE}
  total = time.perf_counter() - started
  print(
    f"Wrote {write_results(args.out, 'initializers', config, rows, {'total': total})}"
  )


def measure(family: Family, epsilon: float, args: argparse.Namespace) -> list[dict]:
  """A row per start: iterations and time on fresh problems.

  `of_default` is the mean over problems of the ratio to the iterations from zero.
  """
  draw = functools.partial(family.problems, points=args.points, seed=args.seed)
  fitted, tested = draw(args.fitted, test=False), draw(args.tests, test=True)
  scale = mean_cost(fitted) if family.cost == "squared" else 1.0
  starts = plain_starts(fitted.x.shape[-1], args.seed)
  if args.steps and not family.weighted:
    starts |= learned_starts(fitted, family.cost, epsilon * scale, args)
  rows, reference = [], None
  for name, start in starts.items():
    each, row = solved(tested, start, epsilon * scale, family.cost)
    reference = each if reference is None else reference
    row["of_default"] = float(np.mean(each / reference))
    rows.append({"method": name, "epsilon": epsilon, **row})
  return rows


def displayed(rows: list[dict]) -> list[dict]:
  """Rows as they are printed; the first error is of the marginal, in all its mass."""
  return [
    {
      "start": row["method"],
      "iterations": f"{row['iterations']:.1f}",
      "of default": f"{row['of_default']:.2f}",
      "converged": f"{row['converged']:.0%}",
      "first error": f"{row['first_error']:.3f}",
      "rate": f"{row['rate']:.3f}",
      "start ms": f"{row['start_ms']:.2f}",
      "all ms": f"{row['milliseconds']:.2f}",
    }
    for row in rows
  ]


def plain_starts(dim: int, seed: int) -> dict[str, Any]:
  """OTT-JAX's starts, and sliced ones that need no fit; all as many random slices."""
  blocks = max(SLICES // dim, 1) * dim
  random = slices.orthogonal(jax.random.key(seed), 1, blocks, dim)[0]
  return {
    "default": initializers.DefaultInitializer(),
    "gaussian": GaussianInitializer(),
    "sorting": initializers.SortingInitializer(),
    "sliced, random": SlicedDualInitializer(slices=random),
    "sliced, principal": SlicedDualInitializer(slices="principal"),
    "sliced, not entropic": SlicedDualInitializer(entropic=False),
    "sliced": SlicedDualInitializer(),
  }


def learned_starts(
  fitted: Clouds, cost: str, epsilon: float, args: argparse.Namespace
) -> dict[str, Any]:
  """Maps from the sliced potentials, or none, learned with a teacher and without.

  Regression on potentials (RA-OT), the same by the dual objective (OA-OT), all features
  and a network by the objective, and a network that sees no slices (Meta OT).
  """
  query = fitted.x * (2.0 if cost == "squared" else 1.0) / epsilon
  x, y = (jnp.asarray(side)[:, None] for side in (query, fitted.y))
  seen = [
    Activation(x[i : i + BATCH], y[i : i + BATCH], None, None, None, None)
    for i in range(0, len(query), BATCH)
  ]
  dim, rng = query.shape[-1], jax.random.key(args.seed)
  drawn = slices.orthogonal(rng, 1, SLICES, dim)
  regress = functools.partial(
    fit_by_regression, seen[1:], drawn, iterations=TEACHER_ITERATIONS
  )
  descend = functools.partial(
    fit_by_objective,
    activations=seen[1:],
    held_out=seen[:1],
    steps=args.steps,
    seed=args.seed,
    progress=False,
  )
  # On the sphere's average, a start of the right size that knows no dual.
  average = DualMap(drawn, jnp.full((1, SLICES), dim / SLICES), ("potentials",))
  maps = {
    "regression": regress(),
    "regression, all features": regress(features=KINDS),
    "objective": descend(average).dual_map,
    "objective, no slices": descend(
      unsliced_map(1, dim), hidden=HIDDEN, learning_rate=2e-2
    ).dual_map,
  }
  maps["objective, all features, network"] = descend(
    maps["regression, all features"], hidden=HIDDEN
  ).dual_map
  return {name: SlicedDualInitializer(held) for name, held in maps.items()}


def mean_cost(clouds: Clouds) -> float:
  """Of |x - y|^2, over all pairs of the first problems."""
  pairs = clouds.x[:8, :, None] - clouds.y[:8, None]
  return float(np.mean(np.sum(pairs**2, -1)))


def problem_of(
  clouds: Clouds, epsilon: jax.Array, cost: str
) -> linear_problem.LinearProblem:
  x, y, a, b = map(jnp.asarray, clouds)
  cloud = pointcloud.PointCloud(x, y, COSTS[cost](), epsilon=epsilon)
  return linear_problem.LinearProblem(cloud, a=a, b=b)


@functools.partial(jax.jit, static_argnames="cost")
def _started(clouds, start, epsilon, cost):
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


@functools.partial(jax.jit, static_argnames="cost")
def _iterated(clouds, f, epsilon, cost) -> Solved:
  """Sinkhorn from f on all problems, one after the other."""
  # Blocks of one: counts are exact.
  solver = sinkhorn.Sinkhorn(
    inner_iterations=1, max_iterations=MOST_ITERATIONS, threshold=TOLERANCE
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
  clouds: Clouds, start: Any, epsilon: float, cost: str
) -> tuple[np.ndarray, dict[str, Any]]:
  """Iterations of each problem from one start, and their row.

  Milliseconds are per problem, of the start alone and with the iterations after it.
  """
  clouds = jax.tree.map(jnp.asarray, clouds)
  epsilon = jnp.float32(epsilon)
  f = jax.block_until_ready(_started(clouds, start, epsilon, cost))
  found = jax.tree.map(np.asarray, _iterated(clouds, f, epsilon, cost))
  times = []
  for _ in range(REPEATS):
    begun = time.perf_counter()
    f = jax.block_until_ready(_started(clouds, start, epsilon, cost))
    between = time.perf_counter()
    jax.block_until_ready(_iterated(clouds, f, epsilon, cost))
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


if __name__ == "__main__":
  main()
