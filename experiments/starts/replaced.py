"""Iterations from each start in the place of a trained teacher's attention."""

import pathlib
from collections.abc import Sequence
from typing import Any

from flax import nnx

from asap_jax.compiler.operators import Sinkhorn
from asap_jax.plotting import series_style, subplots
from experiments.common import replacements
from experiments.common.digits import Split, batches_of
from experiments.common.train import accuracy
from experiments.starts.methods import CONVERGED, ITERATIONS, operators

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


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """TV to converged plans and column error against iterations, a line a start."""
  ((left, right),) = subplots(1, 2, width=4.6, height=3.6)
  families: dict[str, list[tuple[int, dict[str, Any]]]] = {}
  for row in rows:
    family, at, count = row["method"].partition("@")
    if at and count.isdecimal() and int(count) <= ITERATIONS:
      families.setdefault(family, []).append((int(count), row))
  for index, (family, points) in enumerate(families.items()):
    label = "zero" if family == "sinkhorn" else family
    counts = [count for count, _ in points]
    for axes, name in ((left, "tv_converged"), (right, "column_error")):
      values = [row[name] for _, row in points]
      axes.plot(counts, values, label=label, **series_style(index))
  for axes, name in ((left, "TV to the converged plan"), (right, "column error")):
    axes.set(xscale="log", yscale="log", xlabel="iterations", ylabel=name)
    ticks = [1, 2, 3, 5, 10, ITERATIONS]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
  left.legend(fontsize="small", title="start")
  left.figure.savefig(path, dpi=150)
