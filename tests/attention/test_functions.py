"""Values and gradients of the three attention functions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracles, references

from asap_jax.attention import functions as attention
from asap_jax.dual_map.predict import DualMap

BATCH, N, M, HEADS, DIM, VALUES, SLICES = 2, 6, 9, 2, 4, 3, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY = 2 * normal(BATCH, N, HEADS, DIM)
KEY, VALUE = normal(BATCH, M, HEADS, DIM), normal(BATCH, M, HEADS, VALUES)
BIAS = normal(BATCH, HEADS, N, M)
QUERY_MASK = jnp.asarray([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]], bool)
KEY_MASK = jnp.arange(M) < jnp.asarray([[7], [4]])
MASK = nnx.make_attention_mask(QUERY_MASK, KEY_MASK)
MASKS = {"query_mask": np.asarray(QUERY_MASK), "key_mask": np.asarray(KEY_MASK)}
DUAL_MAP = DualMap(normal(HEADS, SLICES, DIM), 0.5 * normal(HEADS, SLICES + DIM + 2))

KEY_SIDE = dataclasses.replace(DUAL_MAP, side="key")
SIDES = {
  "key": KEY_SIDE,
  "momentum": DualMap(
    DUAL_MAP.directions,
    DUAL_MAP.weights,
    side="key",
    relaxation=jnp.asarray([[1.4, 1.1], [0.9, 1.2]]),
    momentum=jnp.asarray([[0.2, 0.3], [0.5, -0.4]]),
  ),
  "half": dataclasses.replace(KEY_SIDE, half=True),
}

softmax = jax.jit(
  attention.softmax_attention, static_argnames=("is_causal", "scale", "epsilon")
)
sinkhorn = jax.jit(
  attention.sinkhorn_attention,
  static_argnames=("iterations", "scale", "epsilon", "dtype"),
)
asap = jax.jit(attention.asap_attention, static_argnames=("scale", "epsilon", "dtype"))
DOUBLY_STOCHASTIC = {
  "sinkhorn": functools.partial(sinkhorn, iterations=5),
  "asap": functools.partial(asap, dual_map=DUAL_MAP),
  "half": functools.partial(asap, dual_map=SIDES["half"]),
}
both = pytest.mark.parametrize("name", DOUBLY_STOCHASTIC)


def sown_weights(function, *inputs, **options):
  """What an attention function sows into the module that it is given."""
  sown = {}

  class Module:
    def sow(self, kind, name, value):
      sown[kind, name] = value

  @jax.jit
  def run(inputs):
    function(*inputs, module=Module(), **options)
    return sown["intermediates", "attention_weights"]

  return run(inputs)


@pytest.mark.parametrize("case", ["plain", "mask", "causal", "bias", "mask and bias"])
def test_softmax_attention_is_that_of_flax(case):
  value = KEY**2  # Flax's own has values as wide as keys
  query = normal(BATCH, M, HEADS, DIM)  # as many as the keys, for the causal case
  given = {}
  if "mask" in case:
    mask = jnp.asarray(RANDOM.random((BATCH, 1, M, M)) < 0.5)
    given["mask"] = mask | jnp.eye(M, dtype=bool)  # no empty rows
  if "bias" in case:
    given["bias"] = normal(BATCH, HEADS, M, M)
  if case == "causal":
    given["is_causal"] = True
  expected = nnx.dot_product_attention(query, KEY, value, **given)
  np.testing.assert_allclose(softmax(query, KEY, value, **given), expected, atol=1e-5)
  if "mask" in case:
    given["mask"] = given["mask"].astype(jnp.float32)
    actual = softmax(query, KEY, value, **given)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_softmax_attention_with_grouped_keys_is_that_of_flax():
  query = normal(BATCH, N, 4, DIM)
  expected = nnx.dot_product_attention(query, KEY, KEY**2)
  np.testing.assert_allclose(softmax(query, KEY, KEY**2), expected, atol=1e-5)


def test_softmax_attention_scale_and_epsilon():
  expected = nnx.dot_product_attention(QUERY * 0.3 / 2 * DIM**0.5, KEY, KEY**2)
  actual = softmax(QUERY, KEY, KEY**2, scale=0.3, epsilon=2.0)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_softmax_attention_of_an_empty_row_is_zero():
  mask = jnp.ones((BATCH, 1, N, M), bool).at[1, 0, 2].set(False)

  def total(query):
    out = attention.softmax_attention(query, KEY, VALUE, mask=mask)
    return out.sum(), out

  slope, out = jax.jit(jax.grad(total, has_aux=True))(QUERY)
  np.testing.assert_array_equal(out[1, 2], 0)
  assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("iterations", [1, 5, 20])
@pytest.mark.parametrize("masked", [False, True])
def test_sinkhorn_attention_against_numpy(iterations, masked):
  expected, _ = references.attention(
    QUERY, KEY, VALUE, iterations, **(MASKS if masked else {})
  )
  mask = MASK if masked else None
  actual = sinkhorn(QUERY, KEY, VALUE, mask=mask, iterations=iterations)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_asap_attention_without_prediction_is_one_iteration():
  nothing = DualMap(DUAL_MAP.directions, jnp.zeros_like(DUAL_MAP.weights))
  expected = sinkhorn(QUERY, KEY, VALUE, mask=MASK, iterations=1)
  actual = asap(QUERY, KEY, VALUE, mask=MASK, dual_map=nothing)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_asap_attention_against_numpy(masked):
  masks = MASKS if masked else {}
  expected, _ = references.attention(QUERY, KEY, VALUE, 1, dual_map=DUAL_MAP, **masks)
  mask = MASK if masked else None
  actual = asap(QUERY, KEY, VALUE, mask=mask, dual_map=DUAL_MAP)
  np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_key_side_maps_against_numpy(name, masked):
  dual_map, masks = SIDES[name], MASKS if masked else {}
  options = {"mask": MASK if masked else None, "dual_map": dual_map}
  expected, plans = references.attention(
    QUERY, KEY, VALUE, dual_map.closures, dual_map=dual_map, **masks
  )
  np.testing.assert_allclose(asap(QUERY, KEY, VALUE, **options), expected, atol=2e-5)
  weights = sown_weights(attention.asap_attention, QUERY, KEY, VALUE, **options)
  np.testing.assert_allclose(weights, plans, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_attention_of_half_a_closure_is_a_softmax_with_the_predicted_bias(
  implementation,
):
  half = functools.partial(
    attention.asap_attention, dual_map=SIDES["half"], implementation=implementation
  )
  options = {"bias": BIAS, "scale": 0.7, "epsilon": 2.0}
  actual = jax.jit(lambda *tokens: half(*tokens, mask=MASK, **options))(
    QUERY, KEY, VALUE
  )
  query, key, value = (np.moveaxis(np.float64(x), 2, 1) for x in (QUERY, KEY, VALUE))
  query = query * 0.7 / 2.0
  for b, h in np.ndindex(BATCH, HEADS):
    masks = np.asarray(QUERY_MASK[b]), np.asarray(KEY_MASK[b])
    g = references.predicted_dual(SIDES["half"], h, query[b, h], key[b, h], *masks)
    scores = query[b, h] @ key[b, h].T + np.float64(BIAS[b, h]) + g
    weights = np.exp(scores - scores.max()) * np.outer(*masks)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    np.testing.assert_allclose(actual[b, :, h], weights @ value[b, h], atol=2e-5)
  # No prediction leaves softmax.
  nothing = dataclasses.replace(SIDES["half"], weights=jnp.zeros_like(DUAL_MAP.weights))
  expected = softmax(QUERY, KEY, VALUE, mask=MASK)
  actual = asap(QUERY, KEY, VALUE, mask=MASK, dual_map=nothing)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_half_a_closure_needs_a_key_side_map():
  half = dataclasses.replace(DUAL_MAP, half=True)
  with pytest.raises(ValueError, match=r"count=0: .*from the query side's dual"):
    attention.asap_attention(QUERY, KEY, VALUE, dual_map=half)


def test_an_exact_key_side_map_gives_doubly_stochastic_half_closures():
  # As many features as keys: the regression of one sequence's duals is exact.
  query, key, value = QUERY[:1], KEY[:1], VALUE[:1]
  directions = normal(HEADS, M, DIM)
  weights = []
  for h in range(HEADS):
    q, k = np.float64(query[0, :, h]) * DIM**-0.5, np.float64(key[0, :, h])
    _, g = oracles.closures(q @ k.T, np.zeros(N), 300)
    columns = references.dual_features(k, q, directions[h])
    weights.append(np.linalg.lstsq(columns, g - g.mean())[0])
  dual_map = DualMap(
    directions, jnp.asarray(np.stack(weights), jnp.float32), side="key", half=True
  )
  sown = sown_weights(attention.asap_attention, query, key, value, dual_map=dual_map)
  np.testing.assert_allclose(sown.sum(-1), 1, atol=1e-5)
  np.testing.assert_allclose(sown.sum(-2), N / M, atol=1e-3)
  plain = sown_weights(attention.softmax_attention, query, key, value)
  assert np.abs(plain.sum(-2) - N / M).max() > 0.5


@both
def test_bias_scale_and_epsilon_against_numpy(name):
  options = {"scale": 0.7, "epsilon": 2.0}
  expected, _ = references.attention(
    QUERY, KEY, VALUE, {"asap": 1, "half": 0, "sinkhorn": 5}[name], bias=BIAS,
    dual_map={"asap": DUAL_MAP, "half": SIDES["half"]}.get(name), **options,
  )  # fmt: skip
  actual = DOUBLY_STOCHASTIC[name](QUERY, KEY, VALUE, BIAS, **options)
  np.testing.assert_allclose(actual, expected, atol=2e-5)


@both
def test_grouped_keys_are_repeated(name):
  single = [x[:, :, :1] for x in (KEY, VALUE)]
  repeated = [jnp.repeat(x, HEADS, axis=2) for x in single]
  expected = DOUBLY_STOCHASTIC[name](QUERY, *repeated)
  actual = DOUBLY_STOCHASTIC[name](QUERY, *single)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 60])
def test_marginals_of_the_sown_weights(iterations):
  weights = sown_weights(
    attention.sinkhorn_attention, QUERY, KEY, VALUE, mask=MASK, iterations=iterations
  )
  rows, columns = weights.sum(-1), weights.sum(-2)
  expected = np.broadcast_to(QUERY_MASK[:, None], rows.shape)
  np.testing.assert_allclose(rows, expected, atol=1e-5)
  share = QUERY_MASK.sum(-1, keepdims=True) / KEY_MASK.sum(-1, keepdims=True)
  expected = np.broadcast_to((KEY_MASK * share)[:, None], columns.shape)
  error = np.abs(columns - expected).max()
  # Not converged after one iteration: all the error is in the columns.
  assert error < 1e-3 if iterations == 60 else error > 1e-2


@both
def test_half_precision(name):
  inputs = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
  actual = DOUBLY_STOCHASTIC[name](*inputs, mask=MASK)
  assert actual.dtype == jnp.bfloat16
  exact = DOUBLY_STOCHASTIC[name](*(x.astype(jnp.float32) for x in inputs), mask=MASK)
  # Only weights and result are rounded: 8 bits each.
  np.testing.assert_allclose(actual.astype(jnp.float32), exact, atol=2e-2)
  by_dtype = DOUBLY_STOCHASTIC[name](QUERY, KEY, VALUE, mask=MASK, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(by_dtype, actual)


def test_rows_of_half_precision_inputs_are_exact():
  inputs = [x.astype(jnp.bfloat16) for x in (3 * QUERY, KEY, VALUE)]
  weights = sown_weights(attention.asap_attention, *inputs, dual_map=DUAL_MAP)
  assert weights.dtype == jnp.float32
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@both
def test_padding_that_is_not_finite_reaches_no_value_and_no_gradient(name):
  cotangent = normal(BATCH, N, HEADS, VALUES) * QUERY_MASK[..., None, None]

  @jax.jit
  @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
  def slopes(*inputs):
    out = DOUBLY_STOCHASTIC[name](*inputs, mask=MASK)
    return jnp.vdot(out, cotangent), out

  masks = [mask[..., None, None] for mask in (QUERY_MASK, KEY_MASK, KEY_MASK)]
  inputs = list(zip((QUERY, KEY, VALUE), masks, strict=True))
  (_, expected), expected_slopes = slopes(*(jnp.where(k, x, 0.0) for x, k in inputs))
  (_, out), actual = slopes(*(jnp.where(k, x, jnp.nan) for x, k in inputs))
  np.testing.assert_array_equal(out, expected)
  np.testing.assert_array_equal(jnp.where(masks[0], 0.0, out), 0)
  for a, b, keep in zip(actual, expected_slopes, masks, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jnp.where(keep, 0.0, a), 0)
    assert jnp.isfinite(a).all()
    assert np.abs(a).max() > 1e-2


def test_gradient_of_sinkhorn_attention_against_finite_differences():
  direction, cotangent = normal(*QUERY.shape), normal(BATCH, N, HEADS, VALUES)

  def moved(step):
    query = np.float64(QUERY) + step * np.float64(direction)
    return np.vdot(references.attention(query, KEY, VALUE, 5, **MASKS)[0], cotangent)

  slope = jax.grad(
    lambda q: jnp.vdot(sinkhorn(q, KEY, VALUE, mask=MASK, iterations=5), cotangent)
  )(QUERY)
  expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
  np.testing.assert_allclose(jnp.vdot(slope, direction), expected, rtol=1e-3)


@both
def test_vmap_agrees_with_the_batch(name):
  function = DOUBLY_STOCHASTIC[name]
  expected = function(QUERY, KEY, VALUE, mask=MASK)
  mapped = jax.vmap(lambda q, k, v, mask: function(q, k, v, mask=mask))
  actual = mapped(QUERY, KEY, VALUE, MASK)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
