"""Operators chosen by measurement."""

import jax
import numpy as np
import pytest
from helpers import clocks, models
from helpers.clocks import maps_are_fast, maps_are_slow
from hypothesis import given
from hypothesis import strategies as st

import asap_jax
from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.candidates import DIAGONAL, FAMILIES, Point, choose, predicted_tv
from asap_jax.compiler.selection import TEACHER

points = st.builds(Point, st.floats(0.01, 100.0), st.floats(0.0, 1.0))
UNCUT = f"sinkhorn@{models.ITERATIONS}"


@given(st.dictionaries(st.text(), points), st.floats(0.01, 100.0), st.floats(0.0, 1.0))
def test_the_choice_is_within_the_target_and_never_dominated(found, exact, target):
  found = found | {"exact": Point(exact, 0.0)}
  chosen = found[choose(found, target)]
  assert chosen.tv <= target
  for other in found.values():
    no_worse = other.milliseconds <= chosen.milliseconds and other.tv <= chosen.tv
    assert not no_worse or other == chosen


def test_a_choice_without_anything_within_is_refused():
  with pytest.raises(ValueError, match=r"target_tv=0.1: .*expected the exact"):
    choose({"far": Point(1.0, 0.2)}, 0.1)


def test_what_is_predicted_goes_through_what_is_known():
  known = {("diagonal", 1): 0.4, ("diagonal", 3): 0.1}
  assert predicted_tv(DIAGONAL, 1, known) == pytest.approx(0.4)
  assert predicted_tv(DIAGONAL, 2, known) == pytest.approx(0.2)
  # Halved by each closure.
  assert predicted_tv(DIAGONAL, 5, known) == pytest.approx(0.025)
  (other,) = (family for family in FAMILIES if family.name == "cumulants")
  expected = other.expected / DIAGONAL.expected * 0.2
  assert predicted_tv(other, 2, known) == pytest.approx(expected)
  # One fit of its own tells where it begins, and the others how fast it falls.
  known["cumulants", 2] = 0.3
  assert predicted_tv(other, 2, known) == pytest.approx(0.3)
  assert predicted_tv(other, 4, known) == pytest.approx(0.075)


def test_a_family_holds_those_that_take_no_more_time():
  by_name = {family.name: family for family in FAMILIES}
  held = {other.name for other in FAMILIES if by_name["network"].holds(other)}
  slices = {"1 slices", "2 slices", "4 slices", "8 slices"}
  assert held == {"network", "cumulants", "diagonal", *slices}
  assert not by_name["cumulants"].holds(DIAGONAL)
  assert not by_name["half, low rank"].holds(DIAGONAL)


def compiled(monkeypatch, of_kind, target_tv, model=None):
  """The toy compiled where operators take such times."""
  clocks.stand_in(monkeypatch, of_kind)
  model = models.toy(depth=1) if model is None else model
  batches = models.batches()[:3]
  return asap_jax.compile(model, batches, target_tv=target_tv, progress=False)


def attention(model):
  return model.blocks[0].attention.attention_fn


@pytest.mark.slow
def test_a_map_is_chosen_where_it_is_faster(monkeypatch):
  target = 0.05
  result = compiled(monkeypatch, maps_are_fast, target)
  (layer,) = result.report.layers
  held = attention(result.model)
  assert isinstance(held, AsapAttention)
  assert not held.dual_map.is_sliced
  assert layer.tv.mean() <= target
  assert layer.milliseconds == 1.1 + held.dual_map.closures
  close = [a for a in layer.alternatives if a.tv <= target]
  assert layer.milliseconds == min(a.milliseconds for a in close)
  np.testing.assert_allclose(layer.standing.tv, layer.tv.mean(), rtol=1e-3)
  # What could not have been faster was not fitted.
  assert not any("slice" in a.label or "network" in a.label for a in layer.alternatives)
  out = models.forward(result.model, models.batches()[1])
  assert np.isfinite(out).all()
  gradient = jax.grad(lambda x: result.model(x).sum())(models.batches()[1])
  assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_cut_sinkhorn_is_chosen_where_it_is_faster(monkeypatch, tmp_path):
  (measured,) = compiled(monkeypatch, maps_are_slow, 1.0).report.layers
  assert {a.label for a in measured.alternatives} >= {"sinkhorn@1", UNCUT, TEACHER}
  assert not any(a.label.startswith("diagonal") for a in measured.alternatives)
  (third,) = (a for a in measured.alternatives if a.label == "sinkhorn@3")
  result = compiled(monkeypatch, maps_are_slow, 1.001 * third.tv)
  (layer,) = result.report.layers
  assert layer.chosen == "sinkhorn@3"
  x = models.batches()[0]
  asap_jax.save(tmp_path / "saved", result.model)
  restored = asap_jax.load(tmp_path / "saved", models.toy(1, depth=1))
  np.testing.assert_array_equal(
    models.forward(restored, x), models.forward(result.model, x)
  )


@pytest.mark.slow
def test_all_iterations_stay_where_nothing_is_close_enough(monkeypatch):
  result = compiled(monkeypatch, maps_are_slow, 0.0)
  (layer,) = result.report.layers
  assert layer.chosen == UNCUT
  assert layer.tv.max() < 1e-5
  assert f"all {models.ITERATIONS} iterations stay" in str(result.report)
  x = models.batches()[0]
  np.testing.assert_allclose(
    models.forward(result.model, x), models.forward(models.toy(depth=1), x), atol=2e-5
  )


@pytest.mark.slow
def test_the_teacher_is_timed_as_it_is_held(monkeypatch):
  """In whatever form it was trained: what is gained is told from that one."""
  model = models.toy(depth=1, implementation="xla")
  result = compiled(monkeypatch, maps_are_slow, 0.0, model)
  (layer,) = result.report.layers
  assert layer.teacher_milliseconds == layer.exact_milliseconds == 1 + models.ITERATIONS
  assert "1.0 times as fast as trained, 1.00 times" in result.report.headline


@pytest.mark.slow
def test_layers_of_a_scan_share_one_kind_of_operator(monkeypatch):
  from compiler.test_scanned_layers import Stacked  # of the slow tests
  from flax import nnx

  result = compiled(monkeypatch, maps_are_fast, 0.05, Stacked(2, nnx.Rngs(0)))
  first, second = result.report.layers
  assert first.chosen == second.chosen
  assert max(first.tv.mean(), second.tv.mean()) <= 0.05
  assert np.isfinite(result.model(models.batches()[0])).all()


@pytest.mark.slow
def test_by_the_clock_the_choice_is_not_dominated():
  batches = models.batches()[:3]
  report = asap_jax.compile(models.toy(), batches, progress=False).report
  for layer in report.layers:
    for other in layer.alternatives:
      same = (other.milliseconds, other.tv) == (
        layer.standing.milliseconds,
        layer.standing.tv,
      )
      assert same or not (
        other.milliseconds <= layer.standing.milliseconds
        and other.tv <= layer.standing.tv
      )
  assert str(report).startswith(report.headline)
  assert set(report.model_milliseconds) == {
    "as trained",
    "exact, fastest",
    "compiled",
    "softmax",
  }


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"operator": asap_jax.Recipe(2, closures=0)}, "closures=0"),
    ({"operator": asap_jax.Recipe(2, hidden=1)}, "hidden=1"),
    ({"operator": asap_jax.Recipe(2, refine_steps=-1)}, "refine_steps=-1"),
    ({"target_tv": -0.1}, "target_tv=-0.1"),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    asap_jax.compile(
      models.toy(depth=1), models.batches()[:2], progress=False, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"hidden": 0, "features": ("query",)},
    {"closures": 3},
  ],
  ids=str,
)
def test_every_recipe_gives_a_model_that_runs(options):
  options = {"hidden": 4, "refine_steps": 3} | options
  model, report = models.compile_recipe(
    models.toy(depth=1), models.batches()[:3], 2, **options
  )
  out = models.forward(model, models.batches()[0])
  assert np.isfinite(out).all()
  label = "asap@3" if options.get("closures") == 3 else "asap"
  assert report.layers[0].chosen == label
  assert attention(model).dual_map.closures == options.get("closures", 1)
  gradient = jax.grad(lambda x: model(x).sum())(models.batches()[0])
  assert np.isfinite(gradient).all()
