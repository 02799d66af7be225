"""Ratios, and what cannot be timed."""

from experiments.common.timing import Laps
from experiments.speed.measuring import measure, with_ratios
from experiments.speed.problem import Shape, make_problem


def test_ratios_are_to_the_fastest_softmax_of_the_kind():
  times = [("softmax", 3.0), ("softmax", 2.0), ("asap", 5.0), ("sinkhorn_step", 8.0)]
  rows = [{"method": name, "milliseconds": value} for name, value in times]
  ratios = [row.get("ratio_to_softmax") for row in with_ratios(rows)]
  assert ratios == [1.5, 1.0, 2.5, None]
  rows.append({"method": "softmax_step", "milliseconds": 4.0})
  assert with_ratios(rows)[3]["ratio_to_softmax"] == 2.0


def test_padded_batches_are_compared_with_padded_softmax():
  shape = Shape(2, 2, 8, 4, "float32", padded=True)
  problem = make_problem(shape, (2,), iterations=3, seed=0)
  methods = ["softmax_step", "sinkhorn_step"]
  rows, reasons = measure(problem, methods, 3, 1.0, Laps())
  assert {row["padded"] for row in rows} == {True}
  assert all("ratio_to_softmax" in row for row in rows)
  assert any("8 padded: sinkhorn_step ott_unrolled: " in each for each in reasons)


def test_what_cannot_be_traced_is_left_out_with_its_reason():
  shape = Shape(batch=2, heads=2, length=6, head_dim=8, dtype="bfloat16")
  problem = make_problem(shape, (2,), iterations=3, seed=0)
  problem = problem._replace(device="gpu")  # where there is none
  rows, reasons = measure(problem, ["softmax"], 3, 0.0, Laps())
  assert rows == []
  (of_dense,) = (reason for reason in reasons if "n x m matrices" in reason)
  assert "softmax xla, softmax jax_nn: " in of_dense
  (of_cudnn,) = (reason for reason in reasons if "softmax cudnn" in reason)
  assert of_cudnn.startswith("skipped at 2 x 2 x 6: ")
