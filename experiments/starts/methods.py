"""Attentions that are compared: iterations from each start, by name."""

from typing import get_args

from asap_jax.compiler.operators import Operator, Sinkhorn, Softmax
from asap_jax.teacher.starts import Start

# Of the teacher: its own count, then those that stand for convergence.
ITERATIONS, CONVERGED = 20, 1000
_SHORT: dict[str, Start] = {
  "diagonal": "gaussian_diagonal",
  "gaussian": "gaussian_low_rank",
  "full": "gaussian_full",
}
OVER_RELAXED = "gaussian@3, relaxation 1.5"


def operators() -> dict[str, Operator]:
  """By name: `sinkhorn@k` from zero, `gaussian@k` from low rank, and so on."""
  zero = {f"sinkhorn@{k}": Sinkhorn(k) for k in (1, 2, 3, 5, 10, ITERATIONS, CONVERGED)}
  starts = {
    f"{name}@{k}": Sinkhorn(k, start=start)
    for name, start in _SHORT.items()
    for k in (1, 2, 3, 5, 10)
  }
  relaxed = Sinkhorn(3, start="gaussian_low_rank", relaxation=1.5)
  return {"softmax_swap": Softmax(), **zero, **starts, OVER_RELAXED: relaxed}


STARTS: tuple[Start, ...] = tuple(s for s in get_args(Start) if s != "gaussian")
