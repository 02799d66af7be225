"""Optimal matching layers with dustbins, as feature matchers have them.

`problem` makes a transport problem of descriptors and reads matches off its plan,
`starts` has the duals to start at, `functions` the exact and the compiled matching,
`layers` the NNX modules.
"""

from asap_jax.matching.functions import (
  asap_matching,
  matching_call,
  sinkhorn_matching,
)
from asap_jax.matching.layers import AmortizedMatching, OptimalMatching
from asap_jax.matching.problem import (
  Matches,
  MatchingProblem,
  matches,
  matching_problem,
)
from asap_jax.matching.starts import matching_start

__all__ = [
  "AmortizedMatching",
  "Matches",
  "MatchingProblem",
  "OptimalMatching",
  "asap_matching",
  "matches",
  "matching_call",
  "matching_problem",
  "matching_start",
  "sinkhorn_matching",
]
