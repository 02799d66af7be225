"""Plans of optimal matchings: exact, and compiled."""

from typing import Any, Literal

from jaxtyping import Array, Bool, Float

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import Duals
from asap_jax.compiler.arrays import AttentionCall
from asap_jax.compiler.operators import Asap, Operator
from asap_jax.dual_map.predict import DualMap
from asap_jax.matching.problem import (
  MatchingProblem,
  log_plan_of,
  matching_problem,
)
from asap_jax.matching.starts import (
  MatchingStart,
  check_matching_start,
  matching_start,
)
from asap_jax.teacher.sinkhorn import sinkhorn_duals


def sinkhorn_matching(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  dustbin: float | Float[Array, ""] = 0.0,
  query_mask: Bool[Array, "*batch n"] | None = None,
  key_mask: Bool[Array, "*batch m"] | None = None,
  *,
  temperature: float | Float[Array, ""] = 1.0,
  iterations: int = 20,
  start: MatchingStart = "dustbin",
  implementation: Literal["ott", "xla"] = "xla",
) -> Float[Array, "*batch n1 m1"]:
  """The optimal matching of descriptors, dustbins included, by Sinkhorn's algorithm.

  (Sarlin et al., 2020, "SuperGlue", arXiv 1911.11763, section 3.2, which takes 100
  iterations.) Works under jit, vmap and grad, in reverse mode; the gradient is that of
  all iterations and of the start, in memory that does not grow with them.

  Args:
    query: see `matching_problem`, as the next five.
    key: likewise.
    dustbin: likewise.
    query_mask: likewise.
    key_mask: likewise.
    temperature: likewise.
    iterations: full ones, at least one. Rows are exact after any number.
    start: `"dustbin"` or a name that `asap_jax.sinkhorn_attention` knows; see
      `matching_start`.
    implementation: `"xla"`, or `"ott"`: OTT-JAX, slower.

  Returns:
    Logarithms of the plan, `[..., n + 1, m + 1]`, -1e30 at absent points. Every point's
    row sums to one, the dustbin's to m, columns at convergence likewise.

  Raises:
    ValueError: as `matching_problem`, for too few iterations, or an unknown name.

  Example:
    >>> import jax
    >>> query = jax.random.normal(jax.random.key(0), (6, 8))
    >>> key = query[:0:-1]  # in reverse, without the first
    >>> log_plan = sinkhorn_matching(query, key, dustbin=3.0, temperature=0.5)
    >>> jax.numpy.exp(log_plan).sum(-1).round(2).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]
  """
  check_matching_start(start)
  options: dict[str, Any] = {"temperature": temperature}
  problem = matching_problem(query, key, dustbin, query_mask, key_mask, **options)
  duals = sinkhorn_duals(
    problem.logits,
    iterations,
    *problem.masses,
    init=matching_start(start, problem),
    implementation=implementation,
  )
  return log_plan_of(problem, duals)


def asap_matching(
  query: Float[Array, "*batch n dim"],
  key: Float[Array, "*batch m dim"],
  dustbin: float | Float[Array, ""] = 0.0,
  query_mask: Bool[Array, "*batch n"] | None = None,
  key_mask: Bool[Array, "*batch m"] | None = None,
  *,
  operator: Operator,
  temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, "*batch n1 m1"]:
  """The matching of a compiled operator: a predicted dual and its closures.

  (Tran, Milkert and Hyde, 2026, arXiv 2605.12879.) Rows are exact, columns as good as
  the operator. Works under jit, vmap and grad, in the operator's leaves too.

  Args:
    query: see `matching_problem`, as all arguments not listed here.
    key: likewise.
    dustbin: likewise.
    query_mask: likewise.
    key_mask: likewise.
    operator: of one head, for two dimensions more than the descriptors have: what
      `asap_jax.fit` makes of `matching_call`, `fitted.attention_fn.operator`.
    temperature: likewise.

  Returns:
    As `sinkhorn_matching`.

  Raises:
    ValueError: as `matching_problem`, and if the operator does not fit the descriptors.

  Example:
    >>> operator = asap_jax.compiler.Sinkhorn(3)
    >>> asap_matching(jnp.ones((3, 2)), jnp.ones((4, 2)), operator=operator).shape
    (4, 5)
  """
  options: dict[str, Any] = {"temperature": temperature}
  problem = matching_problem(query, key, dustbin, query_mask, key_mask, **options)
  if isinstance(operator, Asap):
    check_map(problem, operator.dual_map)
  duals, _ = operator.duals(seen_of(problem))
  return log_plan_of(problem, Duals(duals.f[..., 0, :], duals.g[..., 0, :]))


def matching_call(problem: MatchingProblem) -> AttentionCall:
  """A matching as one call of an attention layer of one head, for `asap_jax.fit`.

  Args:
    problem: with one batch axis, `[batch, n + 1, dim + 2]`.

  Returns:
    `AttentionCall`; the scale of the layer is 1.

  Raises:
    ValueError: if there is not one batch axis.

  Example:
    >>> problem = matching_problem(jnp.ones((2, 3, 4)), jnp.ones((2, 5, 4)))
    >>> matching_call(problem).query.shape
    (2, 4, 1, 6)
  """
  if problem.query.ndim != 3:
    raise ValueError(
      f"problem.query has shape {problem.query.shape}: expected [batch, n + 1, dim + 2]"
    )
  query, key, a, b = problem
  return AttentionCall(query[:, :, None], key[:, :, None], None, None, a, b)


def seen_of(problem: MatchingProblem) -> Activation:
  """A matching as an attention of one head sees it."""
  query, key = (x[..., None, :, :] for x in (problem.query, problem.key))
  a, b = (x[..., None, :] for x in problem.masses)
  return Activation(query, key, query_mask=a, key_mask=b)


def check_map(problem: MatchingProblem, dual_map: DualMap) -> None:
  """Raises ValueError unless a map is of one head and the problem's dimension."""
  heads, _, dim = dual_map.directions.shape
  wanted = problem.query.shape[-1]
  if (heads, dim) != (1, wanted):
    raise ValueError(
      f"operator has {heads} heads of dimension {dim}: expected one of dimension "
      f"{wanted}, two more than the descriptors"
    )
