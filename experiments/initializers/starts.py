"""Starts of Sinkhorn's algorithm that are compared, by name."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from ott.geometry import costs
from ott.initializers.linear import initializers

from asap_jax import DualMap, GaussianDualInitializer, SlicedDualInitializer
from asap_jax.attention.inputs import Activation
from asap_jax.dual_map.features import COMPILED
from asap_jax.potentials.directions import orthogonal
from experiments.initializers.clouds import Clouds
from experiments.initializers.learning import (
  fit_by_objective,
  fit_by_regression,
  unsliced_map,
)

SLICES, HIDDEN, BATCH, TEACHER_ITERATIONS = 16, 32, 32, 1000


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


def plain_starts(dim: int, seed: int) -> dict[str, Any]:
  """OTT-JAX's starts, and Gaussian and sliced ones that need no fit.

  Those of random slices have equally many.
  """
  blocks = max(SLICES // dim, 1) * dim
  random = orthogonal(jax.random.key(seed), 1, blocks, dim)[0]
  return {
    "default": initializers.DefaultInitializer(),
    "gaussian": GaussianInitializer(),
    "gaussian, entropic": GaussianDualInitializer(),
    "gaussian, entropic, low rank": GaussianDualInitializer("low_rank"),
    "sorting": initializers.SortingInitializer(),
    "sliced, random": SlicedDualInitializer(slices=random),
    "sliced, principal": SlicedDualInitializer(slices="principal"),
    "sliced, not entropic": SlicedDualInitializer(entropic=False),
    "sliced": SlicedDualInitializer(),
  }


def learned_starts(
  fitted: Clouds, cost: str, epsilon: float, steps: int, seed: int
) -> dict[str, Any]:
  """Maps from the sliced potentials, or none, learned with a teacher and without.

  Regression on potentials (RA-OT), this map by the dual objective (OA-OT), all features
  and a network by the objective, and a network that sees no slices (Meta OT).
  """
  query = fitted.x * (2.0 if cost == "squared" else 1.0) / epsilon
  x, y = (jnp.asarray(side)[:, None] for side in (query, fitted.y))
  seen = [
    Activation(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(query), BATCH)
  ]
  dim, rng = query.shape[-1], jax.random.key(seed)
  drawn = orthogonal(rng, 1, SLICES, dim)
  regress = functools.partial(
    fit_by_regression, seen[1:], drawn, iterations=TEACHER_ITERATIONS
  )
  descend = functools.partial(
    fit_by_objective,
    activations=seen[1:],
    held_out=seen[:1],
    steps=steps,
    seed=seed,
    progress=False,
  )
  # On the sphere's average, a start of the right size that knows no dual.
  average = DualMap(drawn, jnp.full((1, SLICES), dim / SLICES), ("potentials",))
  maps = {
    "regression": regress(),
    "regression, all features": regress(features=COMPILED),
    "objective": descend(average).dual_map,
    "objective, no slices": descend(
      unsliced_map(1, dim), hidden=HIDDEN, learning_rate=2e-2
    ).dual_map,
  }
  maps["objective, all features, network"] = descend(
    maps["regression, all features"], hidden=HIDDEN
  ).dual_map
  return {name: SlicedDualInitializer(held) for name, held in maps.items()}
