"""Amortized transport without a teacher: dual maps that maximise the dual objective.

With logits S, row sums r and column sums c of the plan (`asap_jax.c_transform`), the
entropic dual with the key side eliminated is concave in f:

  D(f) = sum_i r_i f_i + sum_j c_j g_j(f),  g(f) the c-transform of f,

its gradient is the error of the row sums, r - A 1 with A = exp(S + f + g(f)), and its
maximum is the value of the primal, min over plans of sum A (log A - S), so that
max D - D(f) = KL(converged plan || A). Three amortized methods follow from the maps of
this package:

- RA-OT ("Amortized Optimal Transport from Sliced Potentials", 2026, arXiv 2604.15114):
  least squares of potentials on sliced ones; here ridge regression of the converged
  dual, `fit_by_regression`;
- OA-OT (the same paper): the same map, fitted by maximising the dual objective; here
  with the closure inside and by Adam, `fit_by_objective`;
- Meta OT (Amos et al., 2022, "Meta Optimal Transport", arXiv 2206.05262): a network
  predicts f and maximises the dual objective. Theirs reads measures on a fixed grid;
  a cloud of points has no order, so our form of it, `unsliced_map`, is a network that
  sees a point and a summary of both clouds (`asap_jax.dual_map.network`).

Here the objective is that of the two-sided closure of f, or of as many closures as the
map has: what is fitted is what is used. It is then the refinement of
`asap_jax.compiler.fitting.descent` with the exact column sums in place of the
teacher's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.c_transform.entropic import (
  Duals,
  c_transform,
  column_sums,
  plan,
  row_sums,
)
from asap_jax.compiler.fitting.descent import Refined, refine
from asap_jax.compiler.fitting.ridge import add_batch, empty_statistics, solve_ridge
from asap_jax.compiler.fitting.samples import Sample, pooled
from asap_jax.compiler.fitting.scales import add_network
from asap_jax.compiler.sites import Activation
from asap_jax.dual_map.features import dual_features, feature_count
from asap_jax.dual_map.predict import DualMap
from asap_jax.masses import Weights, centre, zero_invalid
from asap_jax.teacher.sinkhorn import sinkhorn_source_dual


def dual_objective(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  query_weights: Weights = None,
  key_weights: Weights = None,
) -> Float[Array, "*batch"]:
  """D(f), the entropic dual with the key side eliminated (module docstring).

  Per problem it is in units of logits times the mass of the plan, the number of valid
  queries. Invariant to a constant in f. Works under jit, vmap and grad; what lies at
  absent points changes neither value nor gradient.

  Args:
    logits: S, `[..., n, m]`.
    f: query-side dual, `[..., n]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.

  Returns:
    D of each problem, `[...]`.

  Raises:
    ValueError: if weights do not fit the logits.
  """
  n, m = logits.shape[-2:]
  weights = query_weights, key_weights
  f = zero_invalid(f.astype(jnp.promote_types(f.dtype, jnp.float32)), query_weights)
  g = c_transform(logits, f, *weights, to="key")
  rows, columns = row_sums(query_weights, n), column_sums(*weights, n, m)
  return jnp.sum(rows * f, axis=-1) + jnp.sum(columns * g, axis=-1)


def dual_gradient(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  query_weights: Weights = None,
  key_weights: Weights = None,
) -> Float[Array, "*batch n"]:
  """The gradient of `dual_objective` in closed form: row sums asked for less given.

  The plan is that of f and its c-transform, so its columns are exact. Works under jit,
  vmap and grad.

  Args:
    logits: see `dual_objective`, as all arguments.
    f: likewise.
    query_weights: likewise.
    key_weights: likewise.

  Returns:
    `[..., n]`, zero at absent queries.

  Raises:
    ValueError: as in `dual_objective`.
  """
  weights = query_weights, key_weights
  f = zero_invalid(f.astype(jnp.promote_types(f.dtype, jnp.float32)), query_weights)
  g = c_transform(logits, f, *weights, to="key")
  f = jnp.broadcast_to(f, logits.shape[:-1])
  given = plan(logits, Duals(f, g), *weights).sum(-1)
  return row_sums(query_weights, logits.shape[-2]) - given


@jax.jit
def objective_sample(activation: Activation) -> Sample:
  """A sample for `asap_jax.compiler.fitting.descent` whose loss is minus the dual
  objective per row.

  `asap_jax.compiler.fitting.descent.mean_kl` of it is -(sum_i f_i + sum_j c_j g_j) /
  rows, with f and g closed and c the exact column sums: no teacher is run.
  """
  batch, heads, n, _ = activation.query.shape
  m = activation.key.shape[-2]
  columns = column_sums(activation.query_mask, activation.key_mask, n, m)
  columns = zero_invalid(
    jnp.broadcast_to(columns, (batch, heads, m)), activation.key_mask
  )
  return Sample(activation._replace(is_product=None), columns, jnp.zeros(batch))


def fit_by_regression(
  activations: Sequence[Activation],
  directions: Float[Array, "heads slices dim"],
  *,
  iterations: int,
  features: tuple[str, ...] = ("potentials",),
  ridge: float = 1e-6,
) -> DualMap:
  """The linear map by ridge regression on the duals of Sinkhorn's algorithm (RA-OT).

  Host code: it does not run under jit, vmap or grad.

  Args:
    activations: problems to fit on, in any number of batches.
    directions: slices, used for the features.
    iterations: of Sinkhorn per problem; enough of them to converge give RA-OT, fewer
      the calibration of `asap_jax.compile`.
    features: kinds, as in `asap_jax.DualMap`.
    ridge: see `asap_jax.compiler.fitting.ridge.solve_ridge`.

  Returns:
    `DualMap` without a network.

  Raises:
    ValueError: if there is nothing to fit on, or as in the functions named above.
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
  return DualMap(directions, jnp.asarray(solve_ridge(sums, ridge).weights), features)


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

  Adam as in `asap_jax.compiler.fitting.descent.Refiner`, whose other options pass
  through. Host code: it does not run under jit, vmap or grad.

  Args:
    dual_map: where to start: weights of any sensible size, or `unsliced_map`.
    activations: problems to fit on; their duals are not needed.
    held_out: problems to judge by.
    steps: to take in all.
    hidden: units of a network to add; zero for none.
    seed: of the network and the order of samples.
    **options: for instance `learning_rate`, `batch_size`, `progress`.

  Returns:
    `Refined`, with `held_out_kl` the loss: minus the dual objective per row.

  Raises:
    ValueError: if there is nothing to fit on or to judge by, or as in `Refiner`.
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

  Its features are the queries alone; with `hidden` units (`fit_by_objective`) it is a
  network on points that is equivariant to their order. Its one direction is not used.

  Args:
    heads: number of heads.
    dim: head dimension.

  Returns:
    `DualMap` with weights zero.
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
