"""Iterations from each start in the place of a trained teacher's attention."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from asap_jax.compiler.operators import Sinkhorn
from experiments.common import replacements
from experiments.common.digits import Split, batches_of
from experiments.common.train import accuracy
from experiments.starts.methods import CONVERGED, operators

BATCH = 64


def measure(
  teacher: nnx.Module, test: Split, compared: int
) -> tuple[list[dict[str, Any]], str]:
  """A row for each attention: accuracy, closeness to two plans, and time.

  Args:
    teacher: with Sinkhorn attention from zero.
    test: all of it is classified.
    compared: first so many inputs on which plans are compared.

  Returns:
    Rows, whose `tv` is to the teacher's own plans and `tv_converged` to converged ones;
    and how nearly converged those are, in words.
  """
  models = {
    name: replacements.put_in_place(teacher, operator)
    for name, operator in operators().items()
  }
  batches = batches_of(test.inputs[:compared], BATCH, keep_rest=True)
  own = replacements.plan_fidelity(teacher, models, batches)
  limit = Sinkhorn(CONVERGED)
  converged = replacements.plan_fidelity(teacher, models, batches, limit)
  times = replacements.attention_milliseconds(teacher, models, batches[0])
  rows = [
    {
      "part": "replaced",
      "method": name,
      "accuracy": accuracy(model, test, BATCH),
      "tv": own[name]["tv"],
      "tv_converged": converged[name]["tv"],
      "column_error": own[name]["column_error"],
      "milliseconds": times[name],
      "n_test": len(test.labels),
      "n_compared": min(compared, len(test.labels)),
    }
    for name, model in models.items()
  ]
  error = own[f"sinkhorn@{CONVERGED}"]["column_error"]
  return rows, f"column error of the plans called converged: {error:.1e}"


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed."""
  hidden = ("part", "n_test", "n_compared")
  return [{k: v for k, v in row.items() if k not in hidden} for row in rows]
