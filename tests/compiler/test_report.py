"""What a report says of the operators that were measured beside the chosen one."""

import builtins
import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import asap_jax
from asap_jax.compiler import Alternative, LayerReport, Report

ALTERNATIVES = (
  Alternative("sinkhorn@5", 0.04, 0.9),
  Alternative("sinkhorn@1", 0.30, 0.2),
  Alternative("sinkhorn@3", 0.10, 0.5),
  Alternative("asap@2", 0.06, 0.8),
)


def layer(name="layers[a].attention", tv=0.12, milliseconds=0.6, **options):
  figures = {
    field: np.array([value - 0.01, value + 0.01])
    for field, value in (("r2", 0.9), ("tv", tv), ("kl", 0.02), ("column_error", 0.05))
  }
  return LayerReport(
    name=name,
    iterations=20,
    teacher_column_error=np.full(2, 0.01),
    teacher_milliseconds=2.0,
    milliseconds=milliseconds,
    seconds=1.0,
    **figures,
    **options,
  )


def report(*layers, target_tv=None):
  times = {"as trained": 9.0, "compiled": 4.5}
  return Report(layers, times, target_tv, seconds=3.0, device="a chip")


def test_the_first_line_says_what_was_gained():
  exact = Alternative("sinkhorn@20", 0.0, 1.5)
  layers = layer("one", 0.1, 0.5, alternatives=(exact,)), layer("two", 0.3, 1.0)
  lines = str(report(*layers)).splitlines()
  # Teacher 4.0, exact 1.5 + 2.0 where nothing faster was measured, own 1.5.
  assert lines[0] == (
    "Attention 2.7 times as fast as trained, 2.33 times as its fastest exact form; "
    "held-out TV 0.200."
  )
  text = " ".join(lines)
  assert "a chip" in text
  assert "as trained 9.0, compiled 4.5" in text


def test_a_choice_that_stays_exact_is_said_without_alarm():
  exact = Alternative("sinkhorn@20", 0.0, 1.5)
  kept = layer(chosen="sinkhorn@20", alternatives=(exact,))
  last = " ".join(str(report(kept, target_tv=0.05)).split())
  assert last.endswith(
    "all 20 iterations stay, in their fastest form: nothing faster comes within TV "
    "0.05 here."
  )
  assert "iterations stay" not in str(report(kept))


def test_text_is_the_same_in_a_notebook(monkeypatch):
  class ZMQInteractiveShell:  # how rich knows a notebook's kernel
    pass

  text = str(report(layer(alternatives=ALTERNATIVES)))
  monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
  monkeypatch.setenv("FORCE_COLOR", "1")
  assert text == str(report(layer(alternatives=ALTERNATIVES)))
  assert "column error" in text


def test_a_cut_that_is_faster_and_closer_is_named():
  text = str(report(layer(alternatives=ALTERNATIVES)))
  last = " ".join(text[text.index("└") :].split())
  assert (
    "layers[a].attention: Sinkhorn cut to 3 iterations is faster and closer here "
    "(TV 0.1000 in 0.50 ms; asap: 0.1200 in 0.60 ms)."
  ) in last


@pytest.mark.parametrize(
  ("tv", "milliseconds", "expected"),
  [
    (0.12, 0.49, None),  # faster than the cut that is closer
    (0.09, 0.60, None),  # closer than the cut that is faster
    (0.10, 0.50, "3 iterations is as fast and as close"),
    (0.30, 0.30, "1 iteration is faster and as close"),
    (0.35, 0.20, "1 iteration is as fast and closer"),
    (0.35, 5.00, "5 iterations is faster and closer"),  # the closest of all three
    (np.nan, 5.00, None),
  ],
)
def test_only_a_cut_that_is_no_slower_and_no_farther_is_named(
  tv, milliseconds, expected
):
  given = layer(tv=tv, milliseconds=milliseconds, alternatives=ALTERNATIVES)
  text = " ".join(str(report(given)).split())
  assert ("Sinkhorn cut to" in text) == (expected is not None)
  assert expected is None or f"Sinkhorn cut to {expected}" in text


def test_what_stands_is_what_was_measured_among_the_alternatives():
  given = layer(alternatives=ALTERNATIVES, chosen="asap@2")
  assert given.standing == ALTERNATIVES[3]
  assert given.better_cut is None
  chosen_cut = dataclasses.replace(given, chosen="sinkhorn@3")
  assert chosen_cut.standing == ALTERNATIVES[2]
  assert chosen_cut.better_cut is None  # not itself
  own = layer().standing
  assert (own.label, own.tv, own.milliseconds) == ("asap", pytest.approx(0.12), 0.6)
  kept = layer(alternatives=ALTERNATIVES, chosen="teacher")
  assert kept.standing == Alternative("teacher", 0.0, 2.0)
  assert kept.better_cut is None


def test_the_choice_is_printed_where_it_is_not_the_same_for_all():
  plain = str(report(layer(), layer("other")))
  assert "chosen" not in plain
  lines = str(report(layer("one"), layer("two", chosen="teacher"))).splitlines()
  assert max(map(len, lines)) <= 110
  assert sum("chosen" in line for line in lines) == 1
  one, two = (next(line for line in lines if name in line) for name in ("one", "two"))
  assert one.split()[-2] == "asap"
  assert two.split()[-2] == "teacher"


@pytest.mark.parametrize(
  ("label", "cut"),
  [("sinkhorn@12", 12), ("sinkhorn", None), ("asap@2", None), ("sinkhorn@3x", None)],
)
def test_iterations_of_a_cut_are_read_from_its_label(label, cut):
  assert Alternative(label, 0.1, 1.0).cut == cut


def test_iterations_have_no_share_of_a_dual_that_they_predict():
  cut = dataclasses.replace(layer(chosen="sinkhorn@3"), r2=np.full(2, np.nan))
  text = str(report(cut))
  assert "nan" not in text
  row = next(line for line in text.splitlines() if "layers[a]" in line)
  assert row.split("│")[3].strip() == "-"


def test_reports_are_drawn_by_their_own_method():
  (axes,) = report(layer(alternatives=ALTERNATIVES), layer("bare")).plot()
  assert axes.get_title() == "layers[a].attention"
  with pytest.raises(ValueError, match="holds no alternatives: expected some"):
    report(layer()).plot()


def test_matplotlib_is_not_needed_to_import_the_package():
  code = "import sys; sys.modules['matplotlib'] = None; import asap_jax"
  root = pathlib.Path(asap_jax.__file__).parents[1]
  subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
