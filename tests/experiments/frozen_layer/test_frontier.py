"""Comparison with Sinkhorn that is stopped after a few iterations."""

import math

import pytest

from asap_jax.compiler import Alternative
from experiments.frozen_layer.frontier import tv_of_cuts, verdict

CUTS = [
  Alternative("sinkhorn@5", 0.1, 4.0),
  Alternative("sinkhorn@1", 0.5, 1.0),
  Alternative("sinkhorn@2", 0.3, 2.0),
]
TEACHER = Alternative("teacher", 0.0, 9.0)


@pytest.mark.parametrize(
  ("milliseconds", "expected"),
  [
    (0.99, math.inf),
    (1.0, 0.5),
    (1.25, 0.45),  # a quarter of the way from one iteration to two
    (2.0, 0.3),
    (3.0, 0.2),
    (4.0, 0.1),
    (6.5, 0.05),  # half way from five iterations to the teacher
    (9.0, 0.0),
    (50.0, 0.0),
  ],
)
def test_curve_is_linear_between_cuts_and_ends_at_the_teacher(milliseconds, expected):
  assert tv_of_cuts(milliseconds, CUTS, TEACHER) == pytest.approx(expected)


def test_a_cut_that_another_beats_does_not_raise_the_curve():
  slow = Alternative("sinkhorn@3", 0.4, 3.0)
  for milliseconds in (2.0, 2.5, 3.0):
    assert tv_of_cuts(milliseconds, [*CUTS, slow], TEACHER) == pytest.approx(0.3)


def test_a_teacher_that_is_faster_than_a_cut_ends_the_curve_there():
  teacher = Alternative("teacher", 0.0, 3.0)
  assert tv_of_cuts(2.5, CUTS, teacher) == pytest.approx(0.15)
  assert tv_of_cuts(3.5, CUTS, teacher) == 0.0


@pytest.mark.parametrize(
  ("tv", "milliseconds", "expected"),
  [
    (0.19, 3.0, "is below cut Sinkhorn's curve, 0.2000 at equal time"),
    (0.21, 3.0, "is NOT below cut Sinkhorn's curve, 0.2000 at equal time"),
    (0.0, 9.5, "is NOT below cut Sinkhorn's curve, 0.0000"),
    (0.9, 0.5, "is faster than every cut of Sinkhorn that was measured"),
    (math.nan, 3.0, "NOT below"),
  ],
)
def test_verdict_is_plain(tv, milliseconds, expected):
  sentence = verdict(Alternative("asap", tv, milliseconds), CUTS, TEACHER)
  assert sentence.startswith(f"asap: TV {tv:.4f} in {milliseconds:.2f} ms")
  assert expected in sentence


def test_no_cuts_are_refused():
  with pytest.raises(ValueError, match="cuts is empty: expected at least one"):
    tv_of_cuts(1.0, [], TEACHER)
