"""Models as people write them: what is found, replaced, named or refused."""

import collections
import dataclasses
import functools
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import models

import asap_jax
from asap_jax import sinkhorn_attention, softmax_attention
from asap_jax.compiler import api
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recording import Observer
from asap_jax.compiler.sites import find_sinkhorn, held_at, replace_sites

HEADS, WIDTH, TOKENS = 2, 16, 6
ONE = Sinkhorn(1)
TEACHER = functools.partial(sinkhorn_attention, iterations=3, epsilon=0.5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, TOKENS, WIDTH)), jnp.float32)
Pair = collections.namedtuple("Pair", "first second")


class ByHand(nnx.Module):
  """Projects tokens and calls `attend`, which subclasses look up in their own way."""

  def __init__(self, held=None, seed=0):
    self.project = nnx.Linear(WIDTH, 3 * WIDTH, rngs=nnx.Rngs(seed))
    if held is not None:
      self.held = held

  def attend(self, *tokens):
    return self.held(*tokens)

  def __call__(self, x):
    tokens = jnp.split(self.project(x), 3, -1)
    tokens = (y.reshape(*y.shape[:-1], HEADS, WIDTH // HEADS) for y in tokens)
    return x + self.attend(*tokens).reshape(x.shape)


class InDict(ByHand):
  def attend(self, *tokens):
    return self.held["sinkhorn"](*tokens)


class InTuple(ByHand):
  def attend(self, *tokens):
    return self.held[0](*tokens)


class Nested(ByHand):
  def attend(self, *tokens):
    return self.held["layers"][1].second(*tokens)


class OfClass(ByHand):
  kernel = staticmethod(TEACHER)

  def attend(self, *tokens):
    return self.kernel(*tokens)


class OfBaseClass(OfClass):
  pass


class Hidden(ByHand):
  def attend(self, *tokens):
    return TEACHER(*tokens)


def observe(model, batch=X, call=lambda model, batch: model(batch)):
  return Observer(model, [batch, batch], call, progress=False)


def compile(model, batches, operator=ONE, **options):
  # Times of whole models take four programs to compile.
  with mock.patch.object(api, "model_milliseconds", return_value={}):
    return asap_jax.compile(model, batches, operator, progress=False, **options)


def zero_map():
  return asap_jax.DualMap(
    jnp.ones((HEADS, 1, 8)), jnp.zeros((HEADS, 8)), features=("query",)
  )


HELD = {
  "dict": (lambda: InDict({"sinkhorn": TEACHER, "heads": 4}), "held.sinkhorn"),
  "tuple": (lambda: InTuple((TEACHER, None)), "held.0"),
  "list": (lambda: InTuple([TEACHER, "text"]), "held.0"),
  "nested": (
    lambda: Nested({"layers": [None, Pair(softmax_attention, TEACHER)]}),
    "held.layers.1.1",
  ),
  "class": (OfClass, "kernel"),
  "base class": (OfBaseClass, "kernel"),
  "jit": (lambda: ByHand(jax.jit(TEACHER)), "held"),
  "partial of jit": (
    lambda: ByHand(
      functools.partial(
        jax.jit(sinkhorn_attention, static_argnames="iterations"),
        iterations=3,
        epsilon=0.5,
      )
    ),
    "held",
  ),
  "number in an array": (
    lambda: ByHand(
      functools.partial(sinkhorn_attention, iterations=3, epsilon=jnp.asarray(0.5))
    ),
    "held",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "name"), HELD.values(), ids=HELD)
def test_attention_is_found_recorded_and_replaced_wherever_it_is_held(build, name):
  model, expected = build(), ByHand(softmax_attention)(X)
  np.testing.assert_allclose(model(X), ByHand(TEACHER)(X), atol=1e-6)
  (site,) = find_sinkhorn(model)
  assert (site.name, site.teacher, site.options) == (
    name, Sinkhorn(3), {"epsilon": 0.5}
  )  # fmt: skip
  assert [layer.name for layer in observe(model).layers] == [name]
  swapped = replace_sites(model, [site], [softmax_attention])
  assert held_at(swapped, site) is softmax_attention
  np.testing.assert_allclose(swapped(X), expected, atol=1e-6)
  # A module in its place, whose arrays are part of the state.
  swapped = replace_sites(model, [site], [asap_jax.AsapAttention(zero_map())])
  assert len(jax.tree.leaves(nnx.state(swapped, asap_jax.DualParam))) == 2
  assert find_sinkhorn(swapped) == []
  closed = ByHand(functools.partial(sinkhorn_attention, iterations=1))(X)
  # A dual of zeros, closed once, is one iteration.
  graph, state = nnx.split(swapped)
  actual = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X)
  np.testing.assert_allclose(actual, closed, atol=1e-5)
  # The teacher is as it was.
  assert find_sinkhorn(model) == [site]


def test_array_that_is_bound_stays_bound():
  bias = jnp.asarray(np.random.default_rng(1).normal(size=(TOKENS, TOKENS)), "float32")
  model = ByHand(functools.partial(sinkhorn_attention, iterations=3, bias=bias))
  recipe = asap_jax.Recipe(slices=2, refine_steps=0)
  result = compile(model, [X, X], recipe)
  dual_map = result.model.held.dual_map
  expected = ByHand(
    functools.partial(asap_jax.asap_attention, dual_map=dual_map, bias=bias)
  )
  np.testing.assert_allclose(
    nnx.jit(lambda m: m(X))(result.model), expected(X), atol=1e-5
  )
  with pytest.raises(ValueError, match=r"held binds arrays \(bias\).*keep_candidates"):
    compile(model, [X, X], None, keep_candidates=True)


class Two(nnx.Module):
  """One attention that is held, and one that is not."""

  def __init__(self, hidden):
    self.visible = asap_jax.SinkhornMultiHeadAttention(
      HEADS, WIDTH, iterations=2, rngs=nnx.Rngs(0)
    )
    self.hidden = hidden

  def __call__(self, x):
    return self.hidden(x + self.visible(x))


@dataclasses.dataclass(frozen=True)
class Config:
  attend: object = TEACHER


class OfConfig(ByHand):
  def attend(self, *tokens):
    return self.held.attend(*tokens)


def defined(query, key, value):
  return sinkhorn_attention(2.0 * query, key, value, iterations=3)


UNREPLACED = {
  "hard-coded": (Hidden, "hidden: Hidden.attend"),
  "lambda": (lambda: ByHand(lambda *tokens: TEACHER(*tokens)), "hidden: .*<lambda>"),
  "def": (lambda: ByHand(defined), "hidden: defined"),
  "config": (lambda: OfConfig(Config()), "hidden: OfConfig.attend"),
  # In JAX's cache already, where nothing can be heard.
  "jit": (lambda: ByHand(cached), "hidden: defined"),
  "checkpoint": (lambda: ByHand(jax.checkpoint(defined)), "hidden: defined"),
}
cached = jax.jit(defined)


@pytest.mark.parametrize(("build", "name"), UNREPLACED.values(), ids=UNREPLACED)
def test_attention_that_cannot_be_replaced_is_named(build, name):
  hidden = build()
  hidden(X + 0.0)
  line = rf"{name} \(test_models\.py, line \d+\), 3 iterations"
  for _ in range(2):  # a cache of the first time is not taken either
    with pytest.warns(
      UserWarning, match=rf"stays as it is.*: {line}.*self.attention_fn"
    ):
      observed = observe(Two(hidden))
    assert [layer.name for layer in observed.layers] == ["visible"]
    assert len(observed.unreplaced) == 1
  with pytest.raises(
    ValueError, match=r"holds no Sinkhorn .*calls it in.*attention_fn"
  ):
    observe(hidden)


def test_report_names_what_was_not_replaced():
  with pytest.warns(UserWarning, match="stays as it is"):
    report = compile(Two(Hidden()), [X, X]).report
  (name,) = report.unreplaced
  assert name.startswith("hidden: Hidden.attend (test_models.py, line ")
  lines = " ".join(str(report).split())
  assert f"Not compiled, for no module holds its function: {name}." in lines
  assert compile(Two(ByHand(TEACHER)), [X, X]).report.unreplaced == ()


def test_layers_are_left_out_by_name():
  model = Two(ByHand(TEACHER))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    result = compile(model, [X, X], leave=["hidden.held"])
  assert [layer.name for layer in result.report.layers] == ["visible"]
  assert result.report.unreplaced == ()
  assert result.model.hidden.held is TEACHER
  with pytest.raises(ValueError, match=r"leave=\['other'\]: .*'hidden.held'"):
    compile(model, [X, X], leave=["other"])


class Unused(Two):
  def __call__(self, x):
    return x + self.visible(x)


def test_a_layer_that_is_not_called_is_refused_or_left_out():
  model = Unused(ByHand(TEACHER))
  with pytest.raises(ValueError, match=r"hidden\.held: no call .*leave="):
    observe(model)
  left = Observer(
    model, [X, X], lambda model, batch: model(batch), False, ["hidden.held"]
  )
  assert [layer.name for layer in left.layers] == ["visible"]


def test_softmax_and_half_iterations_are_not_named():
  half = functools.partial(sinkhorn_attention, iterations=0, start="gaussian")
  for attend in (softmax_attention, half):
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      assert observe(Two(ByHand(lambda *t, f=attend: f(*t)))).unreplaced == ()


class CallsWithIterations(ByHand):
  def attend(self, *tokens):
    return self.held(*tokens, iterations=2)


def test_iterations_that_the_call_passes_are_refused():
  with pytest.raises(
    ValueError, match=r"held: its call passes iterations=2.*partial\("
  ):
    observe(CallsWithIterations(TEACHER))


class Mapped(nnx.Module):
  def __init__(self, mapped):
    self.attention = asap_jax.SinkhornMultiHeadAttention(
      HEADS, WIDTH, iterations=2, rngs=nnx.Rngs(0)
    )
    self.mapped = nnx.static(mapped)

  def __call__(self, x):
    return self.mapped(self.attention, x)


TRANSFORMATIONS = {
  "jax.vmap": lambda layer, x: jax.vmap(lambda one: layer(one[None])[0])(x),
  "jax.checkpoint": lambda layer, x: jax.checkpoint(lambda x: layer(x))(x),
  "jax.lax.map": lambda layer, x: jax.lax.map(lambda one: layer(one[None])[0], x),
  "nnx.vmap": nnx.vmap(lambda layer, x: layer(x[None])[0], in_axes=(None, 0)),
}


@pytest.mark.parametrize("mapped", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_a_layer_inside_a_transformation_is_refused_with_the_reason(mapped):
  with pytest.raises(ValueError, match=r"transformation that shares it.*vmap"):
    observe(Mapped(mapped))


class Pooled(Two):
  def __call__(self, x):
    return self.visible(x[:, :1], x)


def test_what_the_model_itself_raises_is_the_reason():
  with pytest.raises(ValueError, match=r"does not run on the first.*one token") as e:
    observe(Pooled(ByHand(TEACHER)))
  assert "vmap" not in str(e.value)


@pytest.mark.parametrize(
  "model",
  [linen.Dense(2), {"attend": TEACHER}, TEACHER, lambda x: x],
  ids=["Linen", "pytree", "partial", "function"],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_nnx_module_is_refused(model):
  with pytest.raises(ValueError, match=r"model is of type .*: expected a Flax NNX"):
    asap_jax.compile(model, [X, X])


def test_a_compiled_model_is_said_to_be_compiled():
  with pytest.raises(ValueError, match="compiled already"):
    observe(ByHand(nnx.data(asap_jax.AsapAttention(zero_map()))))


def test_training_mode_with_dropout_stays_and_drops_nothing_meanwhile():
  def build(rate):
    return asap_jax.SinkhornMultiHeadAttention(
      HEADS, WIDTH, iterations=3, dropout_rate=rate, rngs=nnx.Rngs(0)
    )

  model, plain = build(0.5), build(0.0)
  model.train()
  before = jax.tree.map(jnp.copy, nnx.state(model))
  (report,), (expected,) = (
    compile(each, [X, 2 * X]).report.layers for each in (model, plain)
  )
  np.testing.assert_allclose(report.tv, expected.tv, rtol=1e-5)
  result = compile(model, [X, 2 * X]).model
  assert not model.deterministic
  assert not result.deterministic
  models.assert_same_state(model, nnx.merge(nnx.graphdef(model), before))
  result.eval()
  cut = build(0.0)
  cut.attention_fn = functools.partial(sinkhorn_attention, iterations=1)
  cut.eval()
  np.testing.assert_allclose(result(X), cut(X), atol=1e-5)


def test_heads_of_few_dimensions_take_the_directions_there_are():
  model = asap_jax.SinkhornMultiHeadAttention(4, WIDTH, iterations=2, rngs=nnx.Rngs(0))
  recipe = asap_jax.Recipe(refine_steps=0)
  assert recipe.slices > WIDTH // 4
  with pytest.warns(
    UserWarning, match=r"slices=8, but heads of dimension 4.*4 are tak"
  ):
    result = compile(model, [X, X, X], recipe)
  directions = result.model.attention_fn.dual_map.directions
  assert directions.shape == (4, 4, 4)
  products = jnp.einsum("hld,hkd->hlk", directions, directions)
  np.testing.assert_allclose(products, np.broadcast_to(np.eye(4), (4, 4, 4)), atol=1e-5)
