"""Models of digits trained with few iterations from each start."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common.digits import digits
from experiments.common.measuring import BATCH, column_error_of, cost_of, measure
from experiments.common.models import EncoderConfig
from experiments.common.results import pooled_row, with_spread
from experiments.common.train import train_encoders

MODEL = EncoderConfig(length=64, token_size=1, classes=10)
NAMES = (
  "softmax",
  "sinkhorn",
  "sinkhorn@1",
  "sinkhorn@2",
  "sinkhorn@3",
  "gaussian@1",
  "gaussian@2",
  "gaussian@3",
  "amortized",
)


def train(seeds: Sequence[int], steps: int) -> list[dict[str, Any]]:
  """A row for each attention: accuracy, plans, over the run too, and a step's time."""
  measured: dict[str, list[dict[str, Any] | None]] = {name: [] for name in NAMES}
  for seed in seeds:
    data = digits(seed)
    errors: dict[str, list[float]] = {name: [] for name in NAMES}

    def look(name, model, errors=errors, inputs=data.test.inputs[:BATCH]):
      errors[name].append(column_error_of(model, inputs))

    models = train_encoders(
      NAMES, data.train, MODEL, seed, steps, needed=NAMES, look=look
    )
    for name, model in models.items():
      over_the_run = {"column_error_at_checks": errors[name]}
      measured[name].append({**measure(model, data.test), **over_the_run})
  costs = cost_of(models, data.test)
  return [
    {"part": "trained", "method": name, **pooled_row(measured[name]), **costs[name]}
    for name in NAMES
  ]


def displayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows as they are printed."""
  return [
    {
      "method": row["method"],
      "accuracy": with_spread(row, 3),
      "column errors of the layers": " ".join(
        f"{error:.4f}" for error in np.atleast_1d(row["column_errors"])
      ),
      "ms": f"{row['milliseconds']:.1f}",
      "step ms": f"{row['step_milliseconds']:.1f}",
    }
    for row in rows
  ]
