"""One layer from arrays to an operator, without a model."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import models
from scipy.special import logsumexp

import asap_jax
from asap_jax import AttentionCall, sinkhorn_attention
from asap_jax.compiler import FittedAttention, Sinkhorn
from asap_jax.compiler.operators import Asap

HEADS, DIM, TOKENS, SIZE = 2, 8, 6, 4
# Without slices, whose sorting takes long to compile.
PLAIN = asap_jax.Recipe(
  features=("query", "cumulants"), directions="gaussian", refine_steps=0
)
VALID = jnp.arange(TOKENS) < jnp.array([[6], [4], [5], [3]])
MASK = nnx.make_attention_mask(VALID, VALID)


@functools.cache
def calls(count=5):
  """Calls of queries and keys that have something in common."""
  rng = np.random.default_rng(0)
  shape = (2, count, SIZE, TOKENS, HEADS, DIM)
  tokens = jnp.asarray(rng.normal(size=shape) + rng.normal(size=shape[4:]), jnp.float32)
  return [AttentionCall(*pair) for pair in zip(*tokens, strict=True)]


def masked():
  return [call._replace(mask=MASK) for call in calls()]


def fit(batches, operator=PLAIN, **options):
  return asap_jax.fit(batches, operator, progress=False, **options)


@functools.cache
def fitted():
  return fit(masked(), iterations=5)


def attend(function, call, **options):
  return function(call.query, call.key, call.key, mask=call.mask, **options)


def plan_of(query, key, iterations, scale):
  """Sinkhorn from zero in float64, of one head without padding; rows are exact."""
  logits = scale * np.asarray(query, np.float64) @ np.asarray(key, np.float64).T
  n, m = logits.shape
  f = np.zeros(n)
  for _ in range(iterations):
    g = np.log(n / m) - logsumexp(logits + f[:, None], 0)
    f = -logsumexp(logits + g, 1)
  return np.exp(logits + f[:, None] + g)


def test_the_map_is_the_one_that_compile_makes_of_the_model():
  model = models.toy(depth=1)
  wanted = models.compile_recipe(model, models.batches()[:3], 2, refine_steps=0)
  attention = model.blocks[0].attention
  batches = [
    AttentionCall(attention.query(x), attention.key(x)) for x in models.batches()[:3]
  ]
  recipe = asap_jax.Recipe(slices=2, refine_steps=0)
  own = fit(batches, recipe, iterations=models.ITERATIONS)
  compiled = wanted.model.blocks[0].attention.attention_fn.dual_map
  assert isinstance(own.attention_fn.operator, Asap)
  for a, b in zip(
    *map(jax.tree.leaves, (own.attention_fn.operator.dual_map, compiled)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
  (layer,) = wanted.report.layers
  np.testing.assert_allclose(own.report.tv, layer.tv, rtol=1e-3)
  assert own.report.chosen == layer.chosen == "asap"


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"epsilon": 0.5}])
def test_plan_and_report_against_float64(options):
  scale = options.get("scale", DIM**-0.5) / options.get("epsilon", 1.0)
  cut, report = fit(calls(), Sinkhorn(1), iterations=4, name="mine", **options)
  call = calls()[1]  # the one that is held out
  one = jnp.broadcast_to(jnp.eye(TOKENS)[:, None], (SIZE, TOKENS, HEADS, TOKENS))
  plans = np.moveaxis(cut(call.query, call.key, one), 2, 1)
  tv = np.zeros((SIZE, HEADS))
  for i, head in np.ndindex(SIZE, HEADS):
    tokens = call.query[i, :, head], call.key[i, :, head]
    own, wanted = (plan_of(*tokens, count, scale) for count in (1, 4))
    np.testing.assert_allclose(plans[i, head], own, atol=1e-5)
    tv[i, head] = 0.5 * np.abs(own - wanted).sum(1).mean()
  np.testing.assert_allclose(report.tv, tv.mean(0), rtol=1e-3)
  assert (report.name, report.iterations) == ("mine", 4)


@pytest.mark.slow
def test_the_best_by_measurement_is_exact_where_nothing_else_is_close_enough():
  batches = [call._replace(bias=0.3 * jnp.eye(TOKENS)) for call in masked()]
  best, report = fit(batches, None, iterations=2, start="gaussian", target_tv=0.0)
  assert report.chosen in ("sinkhorn@2", "teacher")
  assert {"sinkhorn@1", "gaussian_diagonal@1"} <= {a.label for a in report.alternatives}
  call = batches[0]
  np.testing.assert_allclose(
    attend(best, call, bias=call.bias),
    attend(sinkhorn_attention, call, bias=call.bias, iterations=2, start="gaussian"),
    atol=1e-5,
  )


def test_padding_is_seen_by_the_fit_and_by_the_function():
  def with_padding(call, value):
    pad = jnp.where(VALID[:, :, None, None], 0.0, value)
    return call._replace(query=call.query + pad, key=call.key + pad)

  batches = [with_padding(call, 50.0) for call in masked()]
  function = fitted().attention_fn
  again = fit(batches, iterations=5).attention_fn
  for a, b in zip(*map(jax.tree.leaves, (again, function)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
  out = attend(function, masked()[1])
  np.testing.assert_allclose(attend(function, batches[1]), out, atol=1e-5)
  assert not np.allclose(attend(function, calls()[1]), out, atol=1e-2)


def test_it_is_an_argument_of_jit_and_what_a_gradient_is_taken_in():
  function, call = fitted().attention_fn, masked()[0]
  traced = []

  @jax.jit
  def loss(function, call):
    traced.append(None)
    return (attend(function, call) ** 2).sum()

  gradient = jax.jit(jax.grad(loss))(function, call)
  assert isinstance(gradient, FittedAttention)
  step = jax.tree.map(lambda a, b: a - 1e-4 * b, function, gradient)
  before, after = loss(function, call), loss(step, call)
  assert after < before
  assert len(traced) == 1  # other leaves are the same function to jit
  np.testing.assert_allclose(before, (attend(function, call) ** 2).sum(), rtol=1e-5)


def test_stacked_it_serves_the_layers_of_a_scan():
  call = masked()[0]
  functions = [
    jax.tree.map(lambda leaf, by=by: by * leaf, fitted().attention_fn)
    for by in (1.0, 0.5, 2.0)
  ]

  @jax.jit
  def step(x, function):
    return function(call.query, call.key, x, mask=MASK), None

  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *functions)
  out, _ = jax.jit(lambda stacked: jax.lax.scan(step, call.key, stacked))(stacked)
  wanted = call.key
  for function in functions:
    wanted, _ = step(wanted, function)
  np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_inside_linen_attention_the_mask_arrives():
  layer = linen.MultiHeadDotProductAttention(
    HEADS, qkv_features=HEADS * DIM, attention_fn=fitted().attention_fn
  )
  x = calls()[0].query.reshape(SIZE, TOKENS, -1)
  parameters = layer.init(jax.random.key(0), x)
  out = layer.apply(parameters, x, mask=MASK)
  moved = x + jnp.where(VALID[..., None], 0.0, 3.0)
  again = layer.apply(parameters, moved, mask=MASK)
  np.testing.assert_allclose(again[VALID], out[VALID], atol=1e-5)
  assert "self" not in inspect.signature(fitted().attention_fn).parameters


def test_numpy_arrays_groups_of_heads_and_an_iterator_are_taken():
  batches = [
    AttentionCall(np.tile(call.query, (1, 1, 2, 1)), np.asarray(call.key))
    for call in calls()
  ]
  function, report = fit(iter(batches), iterations=3)
  assert report.tv.shape == (2 * HEADS,)
  call = jax.tree.map(jnp.asarray, batches[0])
  assert attend(function, call).shape == (SIZE, TOKENS, 2 * HEADS, DIM)


def changed(index=0, **fields):
  batches = list(calls())
  batches[index] = batches[index]._replace(**fields)
  return batches


BAD = {
  "no call": (lambda: [jnp.ones(3)] * 2, {}, r"batches: one is of .*AttentionCall"),
  "empty": (lambda: [], {}, "batches is empty"),
  "single": (lambda: calls()[:1], {}, "batches holds a single batch"),
  "axes": (lambda: changed(query=jnp.ones((6, 2, 8))), {}, r"^query has shape .*expec"),
  "key": (
    lambda: changed(key=jnp.ones((4, 6, 2, 7))),
    {},
    r"^key has .*head dim",
  ),
  "heads": (lambda: changed(key=jnp.ones((4, 6, 3, 8))), {}, r"^key has 3 heads"),
  "none": (lambda: changed(key=jnp.ones((4, 0, 2, 8))), {}, r"^key has .*empty"),
  "later": (
    lambda: changed(2, query=jnp.ones((4, 6, 4, 8))),
    {},
    r"^query has shape .*expected 2 heads of dimension 8",
  ),
  "mask": (lambda: changed(mask=jnp.ones((3, 1, 6, 6))), {}, r"^mask has shape"),
  "causal": (
    lambda: changed(2, mask=jnp.tril(jnp.ones((1, 1, 6, 6)))),
    {},
    r"^mask is not the outer product",
  ),
  "bias": (lambda: changed(bias=jnp.ones((5, 6))), {}, r"^bias has shape"),
  "infinite bias": (
    lambda: changed(bias=jnp.full((6, 6), -jnp.inf)),
    {},
    r"^attention: bias is not finite",
  ),
  "nan": (
    lambda: changed(2, key=jnp.full((4, 6, 2, 8), jnp.nan)),
    {"name": "third"},
    r"^third: queries or keys are not finite",
  ),
  "operator": (calls, {"operator": 3}, r"^operator=3"),
  "target": (calls, {"target_tv": 2.0}, r"^target_tv=2"),
  "iterations": (calls, {"iterations": 0, "start": "gaussian"}, r"^iterations=0"),
  "relaxation": (calls, {"relaxation": 2.5}, r"^relaxation=2.5"),
  "epsilon": (calls, {"epsilon": 0.0}, r"^epsilon=0"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("unchecked")
def test_what_makes_no_sense_is_refused_by_its_name(case):
  batches, options, said = BAD[case]
  with pytest.raises(ValueError, match=said):
    fit(batches(), **options)
