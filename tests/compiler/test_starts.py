"""Compiling teachers that start elsewhere than at zero, or over-relax."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import models, oracles

import asap_jax
from asap_jax import AsapAttention, SinkhornMultiHeadAttention, sinkhorn_attention
from asap_jax.compiler import measuring
from asap_jax.compiler.fitting.samples import sample_of
from asap_jax.compiler.operators import Asap, Sinkhorn
from asap_jax.compiler.recorder import recorder
from asap_jax.compiler.sites import find_sinkhorn
from asap_jax.teacher.starts import starting_dual
from experiments.common import replacements

BATCHES = models.batches()[:3]
HELD_OUT = BATCHES[1]
# Nothing is sorted: what compiles fast.
OPTIONS = {"features": ("query", "cumulants"), "hidden": 0}
compile = functools.partial(models.compile_recipe, batches=BATCHES, slices=1, **OPTIONS)


def attention(**options):
  """One layer with logits as sharp as those of the toy model."""
  return SinkhornMultiHeadAttention(
    models.HEADS,
    models.WIDTH,
    kernel_init=nnx.initializers.normal(1.7 / models.WIDTH**0.5),
    rngs=nnx.Rngs(0),
    **options,
  )


def relaxed(iterations=4):
  layer = attention()
  layer.attention_fn = functools.partial(
    sinkhorn_attention, iterations=iterations, relaxation=1.5, implementation="xla"
  )
  return layer


TEACHERS = {
  "gaussian": functools.partial(attention, iterations=2, start="gaussian"),
  "relaxed": relaxed,
}


def plans(model, operators, iterations=None):
  """The teacher's plans on the held-out batch in NumPy, and those of operators."""
  (site,) = find_sinkhorn(model)
  record = recorder(model, [site], lambda model, batch: model(batch))
  ((call,),) = record(HELD_OUT)
  own = site.teacher
  start = starting_dual(own.start, call.query, call.key)
  logits = np.float64(call.logits)
  omega = np.full(own.iterations, own.relaxation)
  found = np.zeros_like(logits)
  for b, h in np.ndindex(logits.shape[:2]):
    duals = oracles.closures(
      logits[b, h], start[b, h], own.iterations, relaxation=omega
    )
    found[b, h] = oracles.plan(logits[b, h], *duals)
  return found, [replacements.plan_of(call, operator) for operator in operators]


def variation(one, other):
  return 0.5 * np.abs(np.float64(one) - other).sum(-1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_reference_is_the_plan_of_the_teacher_itself(kind):
  teacher = TEACHERS[kind]()
  model, report = compile(teacher, refine_steps=0)
  (layer,) = report.layers
  held = model.attention_fn
  assert isinstance(held, AsapAttention)
  (site,) = find_sinkhorn(teacher)
  assert layer.iterations == site.iterations
  operators = [Asap(held.dual_map), Sinkhorn(1), *measuring.cuts(site.teacher)]
  expected, (compiled, zero, *cuts) = plans(teacher, operators)
  np.testing.assert_allclose(layer.tv.mean(), variation(compiled, expected), rtol=1e-2)
  # Cuts keep the start and the relaxation; the last is the teacher, not cut.
  found = [a.tv for a in layer.alternatives if a.cut is not None]
  wanted = [variation(cut, expected) for cut in cuts]
  np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-5)
  assert wanted[-1] < 1e-5
  if kind == "gaussian":
    assert variation(zero, expected) > 2 * wanted[0]


@pytest.mark.slow
def test_every_other_form_of_such_a_teacher_has_its_plans():
  teacher = TEACHERS["gaussian"]()
  own = Sinkhorn(2, None, "gaussian")
  operators = [dataclasses.replace(own, implementation=n) for n in ("xla", "chunked")]
  expected, found = plans(teacher, [own, *operators])
  for each in found:
    np.testing.assert_allclose(each, expected, atol=2e-5)


@pytest.mark.parametrize("kind", TEACHERS)
def test_refinement_aims_at_the_plans_of_such_a_teacher(kind):
  teacher = TEACHERS[kind]()
  (site,) = find_sinkhorn(teacher)
  record = recorder(teacher, [site], lambda model, batch: model(batch))
  ((call,),) = record(HELD_OUT)
  expected, _ = plans(teacher, [])
  found = sample_of(call, site.teacher)
  np.testing.assert_allclose(found.columns, expected.sum(-2), atol=2e-5)
  # From zero they are others.
  other = sample_of(call, Sinkhorn(site.iterations))
  assert np.abs(other.columns - found.columns).max() > 0.01


@pytest.mark.slow
def test_half_iterations_are_left_alone(tmp_path):
  class Pair(nnx.Module):
    def __init__(self):
      self.first = attention(iterations=2, start="gaussian")
      self.half = attention(iterations=0, start="gaussian")

    def __call__(self, x):
      return self.half(self.first(x))

  teacher = Pair()
  model, report = compile(teacher, refine_steps=0)
  assert [layer.name for layer in report.layers] == ["first"]
  assert model.half.attention_fn == teacher.half.attention_fn
  asap_jax.save(tmp_path / "model", model)
  loaded = asap_jax.load(tmp_path / "model", Pair())
  np.testing.assert_array_equal(
    models.forward(loaded, HELD_OUT), models.forward(model, HELD_OUT)
  )


def test_a_model_of_half_iterations_alone_is_refused():
  with pytest.raises(ValueError, match="holds no Sinkhorn attention"):
    compile(attention(iterations=0, start="gaussian"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEACHERS)
def test_experiments_cut_such_a_teacher_where_it_starts(kind):
  teacher = TEACHERS[kind]()
  cut = replacements.cut_sinkhorn(teacher, 1)
  (site,), (own,) = find_sinkhorn(cut), find_sinkhorn(teacher)
  wanted = dataclasses.replace(own.teacher, iterations=1, implementation=None)
  assert site.teacher == wanted
  assert site.options == own.options
  fidelity = replacements.plan_fidelity(teacher, {"cut": cut}, [HELD_OUT])["cut"]
  expected, (plan,) = plans(teacher, [wanted])
  np.testing.assert_allclose(fidelity["tv"], variation(plan, expected), rtol=1e-2)
  out = jax.jit(lambda x: cut(x))(HELD_OUT)
  assert out.shape == HELD_OUT.shape
