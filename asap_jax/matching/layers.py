"""A matching as an NNX module, with what it learns: temperature, dustbin, dual map."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from asap_jax.attention.amortized import DualLoss, objective_loss
from asap_jax.attention.layers import AsapAttention
from asap_jax.c_transform.entropic import closure
from asap_jax.compiler.operators import Asap, Operator
from asap_jax.dual_map.features import feature_count
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.matching.functions import (
  asap_matching,
  check_map,
  seen_of,
  sinkhorn_matching,
)
from asap_jax.matching.problem import MatchingProblem, log_plan_of, matching_problem
from asap_jax.matching.starts import (
  MatchingStart,
  check_matching_start,
  matching_start,
)

# Of the map that learns with the model: linear, without a sort.
_FEATURES = ("query", "cumulants")


class OptimalMatching(nnx.Module):
  """Optimal matching with a learned temperature and a learned score of the dustbins.

  Args:
    temperature: to begin with; what is learned is its logarithm.
    dustbin: score of no match to begin with, in the units of the logits.
    iterations: see `sinkhorn_matching`.
    start: likewise.
    operator: takes the place of the iterations; see `asap_matching`. The leaves of a
      dual map are parameters (`asap_jax.DualParam`).

  Raises:
    ValueError: if the temperature is not positive, there are no iterations, or the
      start is unknown.

  Example:
    >>> layer = OptimalMatching(temperature=0.5, dustbin=3.0)
    >>> query = jax.random.normal(jax.random.key(0), (6, 8))
    >>> layer(query, query[:0:-1]).shape
    (7, 6)
  """

  def __init__(
    self,
    temperature: float = 0.1,
    dustbin: float = 0.0,
    *,
    iterations: int = 20,
    start: MatchingStart = "dustbin",
    operator: Operator | None = None,
  ):
    if not temperature > 0:
      raise ValueError(f"temperature={temperature}: expected a positive number")
    if iterations < 1:
      raise ValueError(f"iterations={iterations}: expected at least one")
    check_matching_start(start)
    self.log_temperature = nnx.Param(jnp.asarray(math.log(temperature)))
    self.dustbin = nnx.Param(jnp.asarray(float(dustbin)))
    self.iterations, self.start = iterations, start
    dual_map = operator.dual_map if isinstance(operator, Asap) else None
    self.map = nnx.data(None if dual_map is None else AsapAttention(dual_map))
    self.operator = nnx.static(operator if dual_map is None else None)

  def __call__(
    self,
    query: Float[Array, "*batch n dim"],
    key: Float[Array, "*batch m dim"],
    query_mask: Bool[Array, "*batch n"] | None = None,
    key_mask: Bool[Array, "*batch m"] | None = None,
  ) -> Float[Array, "*batch n1 m1"]:
    """Logarithms of the plan; see `sinkhorn_matching`."""
    options: dict[str, Any] = {"temperature": jnp.exp(self.log_temperature[...])}
    given = query, key, self.dustbin[...], query_mask, key_mask
    operator = self.operator if self.map is None else Asap(self.map.dual_map)
    if operator is not None:
      return asap_matching(*given, operator=operator, **options)
    options |= {"iterations": self.iterations, "start": self.start}
    return sinkhorn_matching(*given, **options)


class AmortizedMatching(OptimalMatching):
  """An `OptimalMatching` of one closure, whose map learns with the model.

  It begins at the dual of the start `"dustbin"`, to which the map learns what is
  missing, on its own loss: `asap_jax.dual_loss(model)`, to be added to the task's.
  Beyond the paper; see `asap_jax.AmortizedAttention`.

  Args:
    dim: of the descriptors.
    temperature: see `OptimalMatching`.
    dustbin: likewise.

  Raises:
    ValueError: likewise.

  Example:
    >>> layer = AmortizedMatching(8, temperature=0.5, dustbin=3.0)
    >>> query = jax.random.normal(jax.random.key(0), (6, 8))
    >>> layer(query, query[:0:-1]).shape
    (7, 6)
    >>> f"{asap_jax.dual_loss(layer):.1f}"
    '9.0'
  """

  def __init__(self, dim: int, temperature: float = 0.1, dustbin: float = 0.0):
    columns = feature_count(_FEATURES, 1, dim + 2)
    dual_map = DualMap(jnp.ones((1, 1, dim + 2)), jnp.zeros((1, columns)), _FEATURES)
    super().__init__(temperature, dustbin, operator=Asap(dual_map))
    # Set by `model.eval()` and `model.train()`.
    self.deterministic = False
    self.dual_loss = DualLoss(jnp.zeros(()))

  def __call__(
    self,
    query: Float[Array, "*batch n dim"],
    key: Float[Array, "*batch m dim"],
    query_mask: Bool[Array, "*batch n"] | None = None,
    key_mask: Bool[Array, "*batch m"] | None = None,
  ) -> Float[Array, "*batch n1 m1"]:
    """As `OptimalMatching`; in training it also leaves its share of the loss."""
    temperature = jnp.exp(self.log_temperature[...])
    given = query, key, self.dustbin[...], query_mask, key_mask
    problem = matching_problem(*given, temperature=temperature)
    assert self.map is not None
    dual_map = self.map.dual_map
    check_map(problem, dual_map)
    fixed = jax.lax.stop_gradient(problem)
    predict = functools.partial(_predicted, problem=problem)
    f = matching_start("dustbin", problem) + predict(jax.lax.stop_gradient(dual_map))
    if not self.deterministic:
      of_map = matching_start("dustbin", fixed) + _predicted(dual_map, fixed)
      self.dual_loss[...] = objective_loss(seen_of(fixed), of_map[..., None, :], "xla")
    return log_plan_of(problem, closure(problem.logits, f, *problem.masses))


def _predicted(
  dual_map: DualMap, problem: MatchingProblem
) -> Float[Array, "*batch n1"]:
  """What a map adds to a start that knows of the masses already."""
  seen = seen_of(problem)
  a, b = (x[..., None, :] > 0 for x in problem.masses)
  return predict_dual(dual_map, seen.query, seen.key, a, b)[..., 0, :]
