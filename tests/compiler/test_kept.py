"""Candidates kept in a model, and chosen from on another device."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import clocks, models

import asap_jax
from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler import CandidateAttention, Sinkhorn, selection
from asap_jax.compiler.candidates import FAMILIES
from asap_jax.compiler.sites import find_sinkhorn, replace_sites
from asap_jax.dual_map.predict import DualMap

X = models.batches()[0]
UNCUT = f"sinkhorn@{models.ITERATIONS}"


def with_candidates(seed=0):
  """The toy with a made-up map beside its iterations."""
  model = models.toy(seed, depth=1)
  (site,) = find_sinkhorn(model)
  dim = models.WIDTH // models.HEADS
  weights = 0.1 * np.random.default_rng(seed).normal(size=(models.HEADS, dim))
  directions = jnp.ones((models.HEADS, 1, dim))
  dual_map = DualMap(directions, jnp.asarray(weights, jnp.float32), ("query",))
  operators = {
    "teacher": site.teacher,
    UNCUT: Sinkhorn(models.ITERATIONS),
    "sinkhorn@1": Sinkhorn(1),
    "query@1": AsapAttention(dual_map, site.options),
  }
  tvs = dict(zip(operators, ((0.0,), (0.0,), (0.3,), (0.2,)), strict=True))
  attention = CandidateAttention(operators, tvs, UNCUT, site.options)
  return replace_sites(model, [site], [attention])


def held(model):
  return model.blocks[0].attention.attention_fn


def with_label(model, label):
  """The same model with one of its candidates alone."""
  operator = held(model).operators[label]
  if isinstance(operator, Sinkhorn):
    operator = operator.attention_fn
  (site,) = find_sinkhorn(models.toy(depth=1))
  return replace_sites(model, [site], [operator])


@pytest.mark.parametrize("label", ["teacher", UNCUT, "sinkhorn@1", "query@1"])
def test_the_chosen_one_runs(label):
  model = with_candidates()
  held(model).chosen = label
  np.testing.assert_array_equal(
    models.forward(model, X), models.forward(with_label(model, label), X)
  )


def test_candidates_are_saved_and_loaded(tmp_path):
  model = with_candidates()
  asap_jax.save(tmp_path / "saved", model)
  restored = asap_jax.load(tmp_path / "saved", models.toy(1, depth=1))
  assert held(restored).tvs == held(model).tvs
  for label in held(model).operators:
    held(model).chosen = held(restored).chosen = label
    np.testing.assert_array_equal(models.forward(restored, X), models.forward(model, X))


@pytest.mark.parametrize(
  ("times", "target_tv", "chosen"),
  [
    (clocks.maps_are_fast, None, "sinkhorn@1"),
    (clocks.maps_are_fast, 0.25, "query@1"),
    (clocks.maps_are_slow, 0.0, UNCUT),
  ],
  ids=["any", "closer", "exact"],
)
def test_the_fastest_here_is_left(monkeypatch, times, target_tv, chosen):
  clocks.stand_in(monkeypatch, times)
  model = with_candidates()
  result = asap_jax.choose(
    model, models.batches()[:3], target_tv=target_tv, progress=False
  )
  (layer,) = result.report.layers
  assert layer.chosen == chosen
  assert {a.label for a in layer.alternatives} == set(held(model).operators)
  assert not isinstance(held(result.model), CandidateAttention)
  np.testing.assert_array_equal(
    models.forward(result.model, X), models.forward(with_label(model, chosen), X)
  )
  assert held(model).chosen == UNCUT  # untouched


def test_a_model_without_candidates_is_refused():
  with pytest.raises(ValueError, match=r"model holds no candidates: .*keep_candidates"):
    asap_jax.choose(models.toy(depth=1), models.batches()[:2])


def test_one_operator_leaves_nothing_to_keep():
  with pytest.raises(ValueError, match=r"keep_candidates=True with operator=Recipe"):
    asap_jax.compile(
      models.toy(depth=1),
      models.batches()[:2],
      asap_jax.Recipe(2),
      keep_candidates=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True], ids=["plain", "scan"])
def test_what_is_slow_here_is_chosen_elsewhere(monkeypatch, tmp_path, scanned):
  from compiler.test_scanned_layers import Stacked  # of the slow tests

  def build(seed):
    return Stacked(2, nnx.Rngs(seed)) if scanned else models.toy(seed, depth=1)

  batches, target = models.batches()[:3], 0.1
  clocks.stand_in(monkeypatch, clocks.maps_are_slow)
  few = [each for each in FAMILIES if each.slices in (0, 2)]
  monkeypatch.setattr(selection, "FAMILIES", few)
  compiled, here = asap_jax.compile(
    build(0), batches, target_tv=target, keep_candidates=True, progress=False
  )
  assert all(layer.chosen.startswith(("sinkhorn", "gaussian")) for layer in here.layers)
  asap_jax.save(tmp_path / "saved", compiled)
  loaded = asap_jax.load(tmp_path / "saved", build(1))
  np.testing.assert_array_equal(models.forward(loaded, X), models.forward(compiled, X))
  clocks.stand_in(monkeypatch, clocks.maps_are_fast)
  there = asap_jax.choose(loaded, batches, progress=False)
  for layer in there.report.layers:
    assert not layer.chosen.startswith(("teacher", "sinkhorn", "gaussian"))
    assert layer.tv.mean() <= target
  assert np.isfinite(models.forward(there.model, X)).all()
