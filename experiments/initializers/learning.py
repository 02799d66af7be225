"""Amortized transport: dual maps learned from problems, with a teacher or without.

Three methods that follow from the dual maps of `asap_jax`:

- RA-OT ("Amortized Optimal Transport from Sliced Potentials", 2026, arXiv 2604.15114):
  least squares of potentials on sliced ones; here ridge regression of the converged
  dual, `fit_by_regression`;
- OA-OT (this paper too): this map, fitted by maximising the dual objective; here
  with the closure inside and by Adam, `fit_by_objective`;
- Meta OT (Amos et al., 2022, "Meta Optimal Transport", arXiv 2206.05262): a network
  predicts f and maximises the dual objective. Theirs reads measures on a fixed grid;
  a cloud of points has no order, so our form of it, `unsliced_map`, is a network that
  sees a point and a summary of both clouds (`asap_jax.dual_map.network`).

The objective is the one of `asap_jax.compiler.fitting.objective`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.fitting.descent import Refined, refine
from asap_jax.compiler.fitting.objective import objective_sample
from asap_jax.compiler.fitting.ridge import add_batch, empty_statistics, solve_ridge
from asap_jax.compiler.fitting.samples import pooled
from asap_jax.compiler.fitting.scales import add_network
from asap_jax.dual_map.features import dual_features, feature_count
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import centre
from asap_jax.teacher.sinkhorn import sinkhorn_source_dual


def fit_by_regression(
  activations: Sequence[Activation],
  directions: jax.Array,
  *,
  iterations: int,
  features: tuple[str, ...] = ("potentials",),
  ridge: float = 1e-6,
) -> DualMap:
  """The linear map by ridge regression on the duals of Sinkhorn's algorithm (RA-OT).

  Args:
    activations: problems to fit on, in any number of batches.
    directions: slices `[heads, slices, dim]`, used for the features.
    iterations: of Sinkhorn per problem, enough of them to converge.
    features: kinds, as in `asap_jax.DualMap`.
    ridge: penalty relative to each feature's variance.

  Raises:
    ValueError: if there is nothing to fit on.
  """
  _check_given(activations=activations)
  heads, slices, dim = directions.shape
  sums = empty_statistics(heads, feature_count(features, slices, dim))
  for activation in activations:
    masks = activation.query_mask, activation.key_mask
    target = centre(_converged(activation, iterations), masks[0])
    columns = dual_features(
      activation.query, activation.key, directions, features, *masks
    )
    sums = add_batch(sums, columns, target, masks[0])
  return DualMap(directions, jnp.asarray(solve_ridge(sums, ridge)), features)


def fit_by_objective(
  dual_map: DualMap,
  activations: Sequence[Activation],
  held_out: Sequence[Activation],
  *,
  steps: int,
  hidden: int = 0,
  seed: int = 0,
  **options: Any,
) -> Refined:
  """Fits all parameters of a dual map by the dual objective: OA-OT, or Meta OT.

  Args:
    dual_map: where to start: weights of any sensible size, or `unsliced_map`.
    activations: problems to fit on; their duals are not needed.
    held_out: problems to judge by.
    steps: to take in all.
    hidden: units of a network to add; zero for none.
    seed: of the network and the order of samples.
    **options: of `asap_jax.compiler.fitting.descent.Refiner`.

  Returns:
    `Refined`, with `held_out_kl` minus the dual objective per row.

  Raises:
    ValueError: if there is nothing to fit on or to judge by.
  """
  _check_given(activations=activations, held_out=held_out)
  fitted, judged = (
    pooled(jax.device_get(objective_sample(activation)) for activation in given)
    for given in (activations, held_out)
  )
  if hidden:
    few = jax.tree.map(lambda leaf: leaf[:256], fitted[0])
    dual_map = add_network(dual_map, few, hidden, jax.random.key(seed))
  return refine(dual_map, fitted, judged, steps=steps, seed=seed, **options)


def unsliced_map(heads: int, dim: int) -> DualMap:
  """A map without slices or sorts that predicts zero: the start of Meta OT.

  Its features are the queries alone; its one direction is not used.
  """
  return DualMap(
    jnp.ones((heads, 1, dim)), jnp.zeros((heads, dim)), features=("query",)
  )


@functools.partial(jax.jit, static_argnames="iterations")
def _converged(activation: Activation, iterations: int) -> jax.Array:
  masks = activation.query_mask, activation.key_mask
  return sinkhorn_source_dual(activation.logits, iterations, *masks)


def _check_given(**given: Sequence[Activation]) -> None:
  for name, activations in given.items():
    if not activations:
      raise ValueError(f"{name} is empty: expected at least one activation")
