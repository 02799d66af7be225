"""Operators chosen by measurement."""

import functools

import jax
import numpy as np
import pytest
from helpers import models

import asap_jax
from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler import measuring
from asap_jax.compiler import selection as selecting
from asap_jax.compiler.fidelity import FidelitySums
from asap_jax.compiler.measuring import Measured
from asap_jax.compiler.operators import Asap, Softmax
from asap_jax.compiler.selection import Choice

TEACHER = functools.cache(lambda: models.toy(depth=1))


def compile(**options):
  return asap_jax.compile(
    TEACHER(),
    models.batches()[:3],
    4,
    hidden=4,
    refine_steps=10,
    progress=False,
    **options,
  )


def times(of_kind):
  """Stands in for the clock: milliseconds of each kind of operator."""

  def operator_milliseconds(activation, operators, repeats=5):
    return [of_kind(operator) for operator in operators]

  return operator_milliseconds


def attention(model):
  return model.blocks[0].attention.attention_fn


@pytest.mark.slow
def test_any_operator_will_do_and_the_fastest_is_taken():
  result = compile(target_tv=1.0)
  (layer,) = result.report.layers
  uncut = f"sinkhorn@{models.ITERATIONS}"
  fastest = min(
    (a for a in layer.alternatives if a.label != uncut), key=lambda a: a.milliseconds
  )
  assert layer.chosen == fastest.label
  assert layer.milliseconds == fastest.milliseconds


def test_a_map_is_chosen_where_it_is_faster(monkeypatch):
  clock = times(
    lambda o: 1.0 + o.dual_map.closures if isinstance(o, Asap) else 9.0 + o.iterations
  )
  for module in (measuring, selecting):
    monkeypatch.setattr(module, "operator_milliseconds", clock)
  target = 0.15
  result = compile(target_tv=target)
  (layer,) = result.report.layers
  assert layer.chosen.startswith("asap")
  assert layer.tv.mean() <= target
  assert isinstance(attention(result.model), AsapAttention)
  uncut = f"sinkhorn@{models.ITERATIONS}"
  closer = [a for a in layer.alternatives if a.tv <= target and a.label != uncut]
  assert layer.milliseconds == min(a.milliseconds for a in closer)
  # What could not have been faster was not fitted.
  labels = {a.label for a in layer.alternatives}
  assert labels >= {"sinkhorn@1", "asap"}
  assert "asap@2" not in labels
  held = np.mean(result.report.layers[0].tv)
  np.testing.assert_allclose(layer.standing.tv, held, rtol=1e-6)


def test_cut_sinkhorn_is_chosen_where_it_is_faster(monkeypatch, tmp_path):
  clock = times(lambda o: 99.0 if isinstance(o, Asap) else 1.0 + o.iterations)
  for module in (measuring, selecting):
    monkeypatch.setattr(module, "operator_milliseconds", clock)
  (measured,) = compile(target_tv=1.0).report.layers
  (third,) = (a for a in measured.alternatives if a.label == "sinkhorn@3")
  result = compile(target_tv=1.001 * third.tv)
  (layer,) = result.report.layers
  assert layer.chosen == "sinkhorn@3"
  x = models.batches()[0]
  chosen = functools.partial(asap_jax.sinkhorn_attention, iterations=3)
  expected = models.toy(depth=1)
  expected.blocks[0].attention.attention_fn = chosen
  np.testing.assert_allclose(
    models.forward(result.model, x), models.forward(expected, x), atol=2e-5
  )
  asap_jax.save(tmp_path / "saved", result.model)
  restored = asap_jax.load(tmp_path / "saved", models.toy(1, depth=1))
  np.testing.assert_array_equal(
    models.forward(restored, x), models.forward(result.model, x)
  )


@pytest.mark.slow
def test_the_teacher_stays_where_nothing_is_close_enough():
  with pytest.warns(UserWarning, match="no operator reaches target_tv=0"):
    # Few candidates: all of them are fitted in vain.
    result = compile(target_tv=0.0, features=("potentials",))
  (layer,) = result.report.layers
  assert layer.chosen == "teacher"
  assert layer.tv.max() < 1e-5
  assert "teacher" in str(result.report)
  x = models.batches()[0]
  np.testing.assert_allclose(
    models.forward(result.model, x), models.forward(TEACHER(), x), atol=2e-5
  )


def test_choice_is_the_fastest_of_the_close_in_all_layers_of_a_site():
  def measured(label, milliseconds, *tv):
    zeros = np.zeros(1)
    sums = FidelitySums(*[zeros] * 8)
    return [
      Measured(
        label,
        Softmax(),
        sums._replace(tv=np.array([each]), rows=np.ones(1)),
        milliseconds,
      )
      for each in tv
    ]

  choice = Choice(0.1)
  slow = measured("slow", 3.0, 0.05, 0.05)
  assert choice.best is None
  assert choice.could_win(9.0)
  choice.measured = [slow, measured("far", 1.0, 0.05, 0.2)]
  assert choice.best is slow
  # The site's time is that of both its layers.
  assert choice.could_win(5.9)
  assert not choice.could_win(6.0)
  fast = measured("fast", 2.0, 0.1, 0.0)
  choice.measured.append(fast)
  assert choice.best is fast


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"target_tv": -0.1}, "target_tv=-0.1"),
    ({"closures": 0}, "closures=0"),
    ({"hidden": 1}, "hidden=1"),
    ({"refine_steps": -1}, "refine_steps=-1"),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    asap_jax.compile(TEACHER(), models.batches()[:2], 2, progress=False, **options)


@pytest.mark.parametrize(
  "options",
  [
    {"hidden": 0, "features": ("query",)},
    pytest.param({"closures": 3}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_every_option_gives_a_model_that_runs(options):
  options = {"hidden": 4, "refine_steps": 3} | options
  model, report = asap_jax.compile(
    TEACHER(), models.batches()[:3], 2, progress=False, **options
  )
  out = models.forward(model, models.batches()[0])
  assert np.isfinite(out).all()
  label = "asap@3" if options.get("closures") == 3 else "asap"
  assert report.layers[0].chosen == label
  assert attention(model).dual_map.closures == options.get("closures", 1)
  gradient = jax.grad(lambda x: model(x).sum())(models.batches()[0])
  assert np.isfinite(gradient).all()


@pytest.mark.slow
def test_figures_are_of_the_map_that_stands_where_labels_are_shared(monkeypatch):
  # Maps of more columns are slower, and all are faster than cuts.
  def of_kind(operator):
    if not isinstance(operator, Asap):
      return 99.0 + operator.iterations
    return operator.dual_map.weights.shape[-1] / 1000 + operator.dual_map.closures

  clock = times(of_kind)
  for module in (measuring, selecting):
    monkeypatch.setattr(module, "operator_milliseconds", clock)
  with pytest.warns(UserWarning, match="no operator reaches"):
    (wide,) = compile(target_tv=1e-4).report.layers
  single = sorted(a.tv for a in wide.alternatives if a.label == "asap")
  assert len(single) == 4
  result = compile(target_tv=(single[0] + single[1]) / 2)
  (layer,) = result.report.layers
  assert layer.chosen.startswith("asap")
  np.testing.assert_allclose(layer.standing.tv, layer.tv.mean(), rtol=1e-6)
  assert layer.standing.milliseconds == layer.milliseconds
