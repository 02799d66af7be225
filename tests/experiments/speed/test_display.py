"""Curves and exponents of what was timed."""

import pytest

from experiments.speed import display


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, 2.0])
def test_exponent_of_a_power_law(power):
  points = [(n, 0.3 * n**power) for n in (64, 197, 1024)]
  assert display.scaling_exponent(points) == pytest.approx(power)


@pytest.mark.parametrize("points", [[], [(64, 1.0)], [(64, 1.0), (64, 2.0)]])
def test_one_length_has_no_exponent(points):
  assert display.scaling_exponent(points) is None


def test_curves_are_per_sequence_and_head():
  row = {"method": "softmax", "implementation": "xla", "batch": 4, "heads": 2}
  rows = [row | {"length": 64, "temp_bytes": 800}, row | {"length": 128}]
  rows[1] |= {"batch": 1, "temp_bytes": 0}
  rows.append(rows[0] | {"padded": True, "temp_bytes": 80})
  assert display.curves(rows, "temp_bytes") == {("softmax", "xla", None): [(64, 100.0)]}
