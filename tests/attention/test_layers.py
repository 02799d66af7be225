import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import references

from asap_jax import (
  AsapAttention,
  DualMap,
  DualParam,
  SinkhornMultiHeadAttention,
  sinkhorn_attention,
)

BATCH, N, M, HEADS, WIDTH, DIM = 2, 5, 7, 2, 8, 4
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


X, Y = 2 * normal(BATCH, N, WIDTH), 2 * normal(BATCH, M, WIDTH)
VALID = jnp.arange(N) < jnp.asarray([[N], [3]])
DUAL_MAP = DualMap(normal(HEADS, 2, DIM), 0.5 * normal(HEADS, 2 + DIM + 2))


def expected_output(layer, x, y, *args, **kwargs):
  """The layer's projections around the reference in NumPy."""
  query, key, value = (
    np.einsum("bnf,fhd->bnhd", tokens, np.float64(linear.kernel[...]))
    + np.float64(linear.bias[...])
    for tokens, linear in ((x, layer.query), (y, layer.key), (y, layer.value))
  )
  out, _ = references.attention(query, key, value, *args, **kwargs)
  kernel = np.float64(layer.out.kernel[...])
  return np.einsum("bnhd,hdf->bnf", out, kernel) + np.float64(layer.out.bias[...])


def test_self_attention_with_padding_against_numpy():
  layer = SinkhornMultiHeadAttention(
    HEADS, WIDTH, iterations=4, epsilon=0.5, rngs=nnx.Rngs(0)
  )
  mask = nnx.make_attention_mask(VALID, VALID)
  masks = dict.fromkeys(("query_mask", "key_mask"), np.asarray(VALID))
  expected = expected_output(layer, X, X, 4, epsilon=0.5, **masks)
  np.testing.assert_allclose(layer(X, mask=mask), expected, atol=2e-5)


def test_cross_attention_against_numpy():
  layer = SinkhornMultiHeadAttention(HEADS, WIDTH, iterations=2, rngs=nnx.Rngs(0))
  expected = expected_output(layer, X, Y, 2)
  np.testing.assert_allclose(nnx.jit(layer)(X, Y), expected, atol=2e-5)


def test_twenty_iterations_are_the_default():
  layer = SinkhornMultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
  expected = expected_output(layer, 2 * X, 2 * X, 20)
  np.testing.assert_allclose(nnx.jit(layer)(2 * X), expected, atol=5e-5)
  assert np.abs(expected - expected_output(layer, 2 * X, 2 * X, 10)).max() > 2e-4


def test_scale_is_bound_where_it_is_given():
  layer = SinkhornMultiHeadAttention(
    HEADS, WIDTH, iterations=2, scale=0.3, rngs=nnx.Rngs(0)
  )
  expected = expected_output(layer, X, X, 2, scale=0.3)
  np.testing.assert_allclose(layer(X), expected, atol=5e-5)
  plain = SinkhornMultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
  assert "scale" not in plain.attention_fn.keywords


@pytest.mark.slow
@pytest.mark.parametrize(
  "options",
  [
    {"iterations": 1, "start": "gaussian"},
    {"iterations": 0, "start": "gaussian_full"},
    {"iterations": 3, "start": "gaussian_diagonal", "implementation": "xla"},
    {"iterations": 3, "implementation": "chunked"},
    {"iterations": 9, "tolerance": 0.01},
  ],
)
def test_start_and_implementation_are_those_of_the_function(options):
  layer = SinkhornMultiHeadAttention(
    HEADS, WIDTH, epsilon=0.5, rngs=nnx.Rngs(0), **options
  )
  mask = nnx.make_attention_mask(VALID, VALID)

  @jax.jit
  def expected():
    tokens = [linear(X) for linear in (layer.query, layer.key, layer.value)]
    return layer.out(sinkhorn_attention(*tokens, mask=mask, epsilon=0.5, **options))

  np.testing.assert_allclose(layer(X, mask=mask), expected(), atol=1e-5)
  defaults = {"start": "zero", "implementation": None, "tolerance": None}
  assert layer.attention_fn.keywords == {"epsilon": 0.5, **defaults, **options}


def test_arguments_of_flax_pass_through():
  layer = SinkhornMultiHeadAttention(
    4, WIDTH, 16, 3, num_kv_heads=2, in_kv_features=6, use_bias=False, rngs=nnx.Rngs(0)
  )
  out = jax.eval_shape(layer, X, normal(BATCH, M, 6))
  assert out.shape == (BATCH, N, 3)
  assert layer.query.kernel.shape == (WIDTH, 4, 4)
  assert layer.key.kernel.shape == (6, 2, 4)
  assert layer.query.bias is None


def test_arguments_that_make_no_sense_are_refused(unchecked):
  with pytest.raises(ValueError, match=r"iterations=0.*at least one iteration, or"):
    SinkhornMultiHeadAttention(HEADS, WIDTH, iterations=0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="implementation='flash'"):
    SinkhornMultiHeadAttention(HEADS, WIDTH, implementation="flash", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"iterations=-1: expected a number that is not"):
    SinkhornMultiHeadAttention(
      HEADS, WIDTH, iterations=-1, start="gaussian", rngs=nnx.Rngs(0)
    )
  with pytest.raises(
    ValueError, match=r"tolerance=0.0: expected None or a float above"
  ):
    SinkhornMultiHeadAttention(HEADS, WIDTH, tolerance=0.0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"decode=True.*expected False"):
    SinkhornMultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
  layer = SinkhornMultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="is_causal=True"):
    layer(X, is_causal=True)


def test_an_unknown_start_is_refused(unchecked):
  with pytest.raises(ValueError, match=r"start='best': expected one of zero, gaussian"):
    SinkhornMultiHeadAttention(HEADS, WIDTH, start="best", rngs=nnx.Rngs(0))


@pytest.fixture
def compiled_layer():
  return nnx.MultiHeadAttention(
    HEADS,
    WIDTH,
    decode=False,
    attention_fn=AsapAttention(DUAL_MAP, {"epsilon": 0.5}),
    rngs=nnx.Rngs(0),
  )


@pytest.mark.slow
def test_compiled_attention_inside_flax_against_numpy(compiled_layer):
  mask = nnx.make_attention_mask(VALID, VALID)
  masks = dict.fromkeys(("query_mask", "key_mask"), np.asarray(VALID))
  expected = expected_output(
    compiled_layer, X, X, 1, epsilon=0.5, dual_map=DUAL_MAP, **masks
  )
  np.testing.assert_allclose(compiled_layer(X, mask=mask), expected, atol=5e-5)
  jitted = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
  np.testing.assert_allclose(jitted(compiled_layer, X, mask), expected, atol=5e-5)


def test_options_are_bound_and_a_call_may_replace_them():
  inputs = [normal(BATCH, N, HEADS, DIM) for _ in range(3)]
  bound = AsapAttention(DUAL_MAP, {"scale": 0.3, "epsilon": 0.5})

  def expected(**options):
    return references.attention(*inputs, 1, dual_map=DUAL_MAP, **options)[0]

  actual = nnx.jit(bound)(*inputs)
  np.testing.assert_allclose(actual, expected(scale=0.3, epsilon=0.5), atol=5e-5)
  actual = nnx.jit(bound, static_argnames="epsilon")(*inputs, epsilon=1.0)
  np.testing.assert_allclose(actual, expected(scale=0.3), atol=5e-5)


def test_arrays_are_bound_as_part_of_the_state():
  inputs = [normal(BATCH, N, HEADS, DIM) for _ in range(3)]
  bias = normal(N, N)
  bound = AsapAttention(DUAL_MAP, {"bias": bias, "epsilon": 0.5})
  assert bound.options == (("epsilon", 0.5),)
  options = {"dual_map": DUAL_MAP, "epsilon": 0.5}
  for held, factor in ((bound, 1.0), (nnx.clone(bound), 3.0)):
    held.arrays["bias"][...] = factor * bias
    every = np.broadcast_to(factor * bias, (BATCH, HEADS, N, N))
    expected, _ = references.attention(*inputs, 1, bias=every, **options)
    np.testing.assert_allclose(nnx.jit(held)(*inputs), expected, atol=5e-5)


def test_dual_map_of_the_module_is_what_it_was_given():
  held = AsapAttention(DualMap(DUAL_MAP.directions, DUAL_MAP.weights[:, :2],
                               ("potentials",))).dual_map  # fmt: skip
  np.testing.assert_array_equal(held.directions, DUAL_MAP.directions)
  np.testing.assert_array_equal(held.weights, DUAL_MAP.weights[:, :2])
  assert held.features == ("potentials",)


@pytest.mark.slow
@pytest.mark.parametrize(
  "half", [pytest.param(False, marks=pytest.mark.slow), True], ids=["closures", "half"]
)
def test_a_key_side_map_is_kept_with_all_that_it_has(half):
  given = dataclasses.replace(DUAL_MAP, side="key", half=half)
  if not half:
    given = given.with_closures(3)
  module = AsapAttention(given, {"epsilon": 0.5})
  held = module.dual_map
  assert jax.tree.structure(held) == jax.tree.structure(given)
  jax.tree.map(np.testing.assert_array_equal, held, given)
  inputs = [normal(BATCH, length, HEADS, DIM) for length in (N, M, M)]
  expected, _ = references.attention(
    *inputs, given.closures, dual_map=given, epsilon=0.5
  )
  np.testing.assert_allclose(nnx.jit(module)(*inputs), expected, atol=5e-5)
  mapped = jax.vmap(module)(*inputs)
  np.testing.assert_allclose(mapped, expected, atol=5e-5)


def test_filter_picks_directions_and_weights_alone(compiled_layer):
  paths = {path for path, _ in nnx.to_flat_state(nnx.state(compiled_layer, DualParam))}
  held = ("attention_fn", "parameters")
  assert paths == {(*held, "directions"), (*held, "weights")}
  all_paths = {path for path, _ in nnx.to_flat_state(nnx.state(compiled_layer))}
  parameters = {
    path for path, _ in nnx.to_flat_state(nnx.state(compiled_layer, nnx.Param))
  }
  assert paths < parameters == all_paths


@pytest.mark.parametrize("trained", [nnx.Param, DualParam])
def test_optimizer_step_moves_what_its_filter_picks(compiled_layer, trained):
  optimizer = nnx.Optimizer(compiled_layer, optax.sgd(0.1), wrt=trained)
  target = normal(BATCH, N, WIDTH)

  @nnx.jit
  def step(layer, optimizer):
    def loss(layer):
      return ((layer(X) - target) ** 2).sum()

    value, slope = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(layer)
    optimizer.update(layer, slope)
    return value

  before = jax.tree.map(jnp.copy, nnx.state(compiled_layer))
  assert jnp.isfinite(step(compiled_layer, optimizer))
  for path, variable in nnx.to_flat_state(nnx.state(compiled_layer)):
    old = dict(nnx.to_flat_state(before))[path][...]
    moved = np.abs(variable[...] - old).max()
    assert np.isfinite(moved)
    # A bias of the keys shifts every logit of a row, which no plan can see.
    if trained is nnx.Param and path == ("key", "bias"):
      continue
    assert (moved > 0) == (trained is nnx.Param or "attention_fn" in path), path


@pytest.mark.slow
def test_weights_of_a_compiled_layer_are_captured(compiled_layer):
  sowing = nnx.capture(compiled_layer, nnx.Intermediate)
  _, state = sowing(X, sow_weights=True)
  (weights,) = jax.tree.leaves(state)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
