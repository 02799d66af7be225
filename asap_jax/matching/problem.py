r"""Optimal matching with dustbins, as an entropic transport problem between points.

Descriptors q of n points and k of m points have scores
$S_{ij} = \langle q_i, k_j \rangle / T$. One dustbin on either side, of score z with
everything, takes what has no match. All points have mass one, the queries' dustbin m
and the keys' n, so that everything may go there (Sarlin et al., 2020, "SuperGlue",
arXiv 1911.11763, section 3.2).

With two dimensions more it is a problem of products again, for which potentials, starts
and dual maps exist: $q' = (q / T, 1, 0)$, $k' = (k, 0, z)$, the queries' dustbin
$(0, 0, 1)$ and the keys' $(0, z, z)$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from asap_jax.c_transform.entropic import LOG_ZERO, Duals
from asap_jax.masses import zero_invalid
from asap_jax.numerics import float_dtype, logits_einsum


class MatchingProblem(NamedTuple):
  """Points of both sides with their masses, the dustbins last.

  Its four fields are the arguments of whatever takes queries and keys with masses, such
  as `asap_jax.gaussian_potential`.

  Attributes:
    query: `[..., n + 1, dim + 2]`, scaled such that the logits are `query key^T`.
    key: `[..., m + 1, dim + 2]`.
    query_weights: masses `[..., n + 1]`, zero at absent points.
    key_weights: masses `[..., m + 1]`, likewise.
  """

  query: Float[Array, "*batch n1 dim2"]
  key: Float[Array, "*batch m1 dim2"]
  query_weights: Float[Array, "*batch n1"]
  key_weights: Float[Array, "*batch m1"]

  @property
  def logits(self) -> Float[Array, "*batch n1 m1"]:
    """Scores of all pairs, z where a dustbin is one of them."""
    return logits_einsum("...nd,...md->...nm", self.query, self.key)

  @property
  def masses(self) -> tuple[Array, Array]:
    """Of queries and of keys."""
    return self.query_weights, self.key_weights


def matching_problem(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  dustbin: float | Float[Array, ""] = 0.0,
  query_mask: Bool[Array, "*batch n"] | None = None,
  key_mask: Bool[Array, "*batch m"] | None = None,
  *,
  temperature: float | Float[Array, ""] = 1.0,
) -> MatchingProblem:
  """The transport problem of a matching (module docstring).

  Works under jit, vmap and grad.

  Args:
    query: descriptors `[..., n, dim]`.
    key: descriptors `[..., m, dim]`.
    dustbin: z, the score of no match, in the units of the logits.
    query_mask: points that are no padding, `[..., n]`; all by default. Absent points
      may hold anything.
    key_mask: likewise, `[..., m]`.
    temperature: T, by which products of descriptors are divided.

  Returns:
    `MatchingProblem`, float32 or better.

  Raises:
    ValueError: if shapes do not fit, or the temperature is not positive.

  Example:
    >>> problem = matching_problem(jnp.ones((3, 2)), jnp.ones((4, 2)), 0.5)
    >>> problem.logits[0].tolist(), problem.query_weights.tolist()
    ([2.0, 2.0, 2.0, 2.0, 0.5], [1.0, 1.0, 1.0, 4.0])
  """
  _check_descriptors(query, key, query_mask, key_mask)
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(f"temperature={temperature}: expected a positive number")
  dtype = float_dtype(query, key)
  query, key = (
    zero_invalid(x.astype(dtype), mask, axis=-2)
    for x, mask in ((query, query_mask), (key, key_mask))
  )
  z = jnp.asarray(dustbin, dtype)
  one, none = jnp.ones((), dtype), jnp.zeros((), dtype)
  a, b = (
    jnp.ones(x.shape[:-1], dtype) if mask is None else mask.astype(dtype)
    for x, mask in ((query, query_mask), (key, key_mask))
  )
  return MatchingProblem(
    _with_dustbin(query / temperature, (one, none), (none, one)),
    _with_dustbin(key, (none, z), (z, z)),
    jnp.concatenate([a, b.sum(-1, keepdims=True)], -1),
    jnp.concatenate([b, a.sum(-1, keepdims=True)], -1),
  )


def _with_dustbin(
  points: Array, of_points: tuple[Array, Array], of_dustbin: tuple[Array, Array]
) -> Array:
  """Points with two more columns, and a dustbin that has nothing but these."""
  columns = jnp.broadcast_to(jnp.stack(of_points), (*points.shape[:-1], 2))
  dustbin = jnp.pad(jnp.stack(of_dustbin), (points.shape[-1], 0))
  dustbin = jnp.broadcast_to(dustbin, (*points.shape[:-2], 1, dustbin.size))
  return jnp.concatenate([jnp.concatenate([points, columns], -1), dustbin], -2)


def log_plan_of(problem: MatchingProblem, duals: Duals) -> Float[Array, "*batch n1 m1"]:
  """Logarithms of the plan of these duals, -1e30 where a point is absent.

  Args:
    problem: points and masses.
    duals: in the convention of this package (`asap_jax.c_transform`), of float masses.

  Returns:
    `[..., n + 1, m + 1]`; the rows of points sum to one.
  """
  logits = problem.logits + duals.f[..., :, None] + duals.g[..., None, :]
  a, b = problem.masses
  # Duals are of plans whose mass is the number of points that there are.
  scale = jnp.log(a.sum(-1)) - jnp.log(jnp.maximum((a > 0).sum(-1), 1))
  pairs = (a > 0)[..., :, None] & (b > 0)[..., None, :]
  return jnp.where(pairs, logits + scale[..., None, None], LOG_ZERO)


class Matches(NamedTuple):
  """For every query its key.

  Attributes:
    key: place of the key, `[..., n]`, -1 where there is no match.
    confidence: of the match, `[..., n]`: its share of the query's mass, zero where
      there is none.
  """

  key: Int[Array, "*batch n"]
  confidence: Float[Array, "*batch n"]


def matches(log_plan: Float[Array, "*batch n1 m1"], threshold: float = 0.2) -> Matches:
  """Pairs that are each other's best, dustbins aside, and certain enough.

  Works under jit and vmap.

  Args:
    log_plan: `[..., n + 1, m + 1]`, as of `sinkhorn_matching`.
    threshold: confidence that a match has to exceed, from 0 to below 1.

  Returns:
    `Matches`, of `[..., n]` each.

  Raises:
    ValueError: if the plan has no points beside its dustbins, or the threshold is out
      of range.

  Example:
    >>> found = matches(jnp.log(jnp.array([[0.1, 0.8, 0.1], [0.9, 0.2, 0.9]])))
    >>> found.key.tolist(), f"{found.confidence[0]:.2f}"
    ([1], '0.80')
  """
  if log_plan.ndim < 2 or min(log_plan.shape[-2:]) < 2:
    raise ValueError(
      f"log_plan has shape {log_plan.shape}: expected [..., n + 1, m + 1], a point and "
      "a dustbin at least on either side"
    )
  if not 0.0 <= threshold < 1.0:
    raise ValueError(f"threshold={threshold}: expected a number from 0 to below 1")
  scores = log_plan[..., :-1, :-1]
  best = scores.argmax(-1)
  back = jnp.take_along_axis(scores.argmax(-2), best, -1)
  largest = jnp.exp(scores.max(-1))
  is_match = (back == jnp.arange(scores.shape[-2])) & (largest > threshold)
  return Matches(jnp.where(is_match, best, -1), jnp.where(is_match, largest, 0.0))


def _check_descriptors(
  query: Array, key: Array, query_mask: Array | None, key_mask: Array | None
) -> None:
  shapes = f"query {query.shape} and key {key.shape}"
  if min(query.ndim, key.ndim) < 2 or query.shape[:-2] != key.shape[:-2]:
    raise ValueError(f"{shapes}: expected [..., points, dim] with equal batch axes")
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(f"{shapes}: expected the same last dimension")
  if 0 in query.shape[-2:] + key.shape[-2:]:
    raise ValueError(f"{shapes}: expected at least one point and one dimension")
  given = ("query_mask", query_mask, query), ("key_mask", key_mask, key)
  for name, mask, points in given:
    if mask is None:
      continue
    if mask.shape != points.shape[:-1] or mask.dtype != jnp.bool_:
      raise ValueError(
        f"{name} has shape {mask.shape} and dtype {mask.dtype}: expected boolean "
        f"{points.shape[:-1]}"
      )
