"""Masks, dropout, errors, and Flax's own attention layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import references

from asap_jax import asap_attention, sinkhorn_attention, softmax_attention
from asap_jax.dual_map.predict import DualMap

BATCH, N, M, HEADS, DIM = 2, 5, 7, 2, 4
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY, KEY = 2 * normal(BATCH, N, HEADS, DIM), normal(BATCH, M, HEADS, DIM)
VALUE = normal(BATCH, M, HEADS, DIM)
DUAL_MAP = DualMap(normal(HEADS, 2, DIM), 0.5 * normal(HEADS, 2 + DIM + 2))
KEY_VALID = jnp.arange(M) < jnp.asarray([[5], [3]])
sinkhorn = functools.partial(sinkhorn_attention, iterations=3)
asap = functools.partial(asap_attention, dual_map=DUAL_MAP)


@functools.partial(jax.jit, static_argnums=0, static_argnames="static")
def run(attend, *inputs, static=(), **options):
  """An attention function, or a layer, compiled: much faster than eager calls."""
  return attend(*inputs, **options, **dict(static))


ALL = {"softmax": softmax_attention, "sinkhorn": sinkhorn, "asap": asap}
doubly_stochastic = pytest.mark.parametrize("attend", [sinkhorn, asap])
everyone = pytest.mark.parametrize("attend", ALL.values(), ids=ALL)


def test_mask_of_keys_alone_leaves_all_queries_when_lengths_differ():
  expected, _ = references.attention(
    QUERY, KEY, VALUE, 3, key_mask=np.asarray(KEY_VALID)
  )
  mask = KEY_VALID[:, None, None, :]
  actual = run(sinkhorn, QUERY, KEY, VALUE, mask=mask)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@doubly_stochastic
def test_mask_of_keys_alone_is_refused_when_lengths_agree(attend):
  with pytest.raises(ValueError, match=r"one side alone.*make_attention_mask"):
    attend(KEY, KEY, VALUE, mask=KEY_VALID[:, None, None, :])


def test_masks_may_differ_between_heads():
  queries = jnp.asarray(RANDOM.random((BATCH, HEADS, N)) < 0.7).at[..., 0].set(True)
  keys = jnp.asarray(RANDOM.random((BATCH, HEADS, M)) < 0.7).at[..., 0].set(True)
  actual = run(
    sinkhorn, QUERY, KEY, VALUE, mask=queries[..., :, None] & keys[..., None, :]
  )
  for head in range(HEADS):
    one = slice(head, head + 1)
    expected, _ = references.attention(
      QUERY[:, :, one], KEY[:, :, one], VALUE[:, :, one], 3,
      query_mask=np.asarray(queries[:, head]), key_mask=np.asarray(keys[:, head]),
    )  # fmt: skip
    np.testing.assert_allclose(actual[:, :, one], expected, atol=1e-5)


@doubly_stochastic
def test_mask_without_any_valid_token_gives_zero(attend):
  valid = jnp.ones((BATCH, N), bool).at[1].set(False)
  mask = nnx.make_attention_mask(valid, KEY_VALID)
  out = run(attend, QUERY, KEY, VALUE, mask=mask)
  np.testing.assert_array_equal(out[1], 0)
  assert np.abs(out[0]).max() > 0


@doubly_stochastic
def test_mask_that_is_no_product_is_refused_or_marked(attend):
  mask = jnp.ones((BATCH, 1, N, M), bool).at[1, 0, 2, 3].set(False)
  with pytest.raises(ValueError, match=r"not the outer product.*make_attention_mask"):
    attend(QUERY, KEY, VALUE, mask=mask)
  # The values of a traced mask raise nothing; the element's result is NaN.
  out = run(attend, QUERY, KEY, VALUE, mask=mask)
  assert jnp.isnan(out[1]).all()
  np.testing.assert_allclose(
    out[0], run(attend, QUERY[:1], KEY[:1], VALUE[:1])[0], atol=1e-5
  )


@doubly_stochastic
def test_causal_use_and_decoding_are_refused(attend):
  with pytest.raises(ValueError, match=r"is_causal.*use softmax_attention"):
    attend(KEY, KEY, VALUE, is_causal=True)
  causal = nnx.make_causal_mask(jnp.ones((BATCH, M)))
  with pytest.raises(ValueError, match=r"not the outer product"):
    attend(KEY, KEY, VALUE, mask=causal)
  with pytest.raises(ValueError, match=r"one token.*use softmax_attention"):
    attend(QUERY[:, :1], KEY, VALUE)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((N, M), "expected"),
    ((BATCH, 1, N, N), "expected"),
    ((BATCH, 1, M, N), "expected"),
  ],
)
@doubly_stochastic
def test_mask_shapes_that_do_not_fit_are_refused(attend, shape, message):
  with pytest.raises(ValueError, match=f"mask has shape .*{message}"):
    attend(QUERY, KEY, VALUE, mask=jnp.ones(shape, bool))


@pytest.mark.parametrize(
  ("query", "key", "value", "message"),
  [
    ((N, DIM), (M, DIM), (M, DIM), "length, heads, dim"),
    ((2, N, 2, 4), (M, 2, 4), (M, 2, 4), "length, heads, dim"),
    ((2, N, 2, 4), (3, M, 2, 4), (3, M, 2, 4), "equal batch axes"),
    ((2, N, 2, 4), (2, M, 2, 5), (2, M, 2, 4), "same head dimension"),
    ((2, N, 2, 4), (2, M, 2, 4), (2, M + 1, 2, 4), "same length and heads"),
    ((2, N, 2, 4), (2, M, 2, 4), (2, M, 1, 4), "same length and heads"),
    ((2, N, 3, 4), (2, M, 2, 4), (2, M, 2, 4), "multiple"),
  ],
)
@everyone
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused(attend, query, key, value, message):
  with pytest.raises(ValueError, match=message):
    attend(jnp.zeros(query), jnp.zeros(key), jnp.zeros(value))


@everyone
@pytest.mark.usefixtures("unchecked")
def test_options_that_are_not_understood_are_refused(attend):
  with pytest.raises(ValueError, match=r"epsilon=0.*positive"):
    attend(QUERY, KEY, VALUE, epsilon=0.0)
  for name in (
    "einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"{name}.*expected None"):
      attend(QUERY, KEY, VALUE, **{name: jnp.einsum})


def test_iterations_and_dual_maps_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"iterations=0"):
    sinkhorn_attention(QUERY, KEY, VALUE, iterations=0)
  other = DualMap(DUAL_MAP.directions[:1], DUAL_MAP.weights[:1])
  with pytest.raises(ValueError, match=r"1 heads of dimension 4: got 2 heads"):
    asap_attention(QUERY, KEY, VALUE, dual_map=other)
  other = DualMap(DUAL_MAP.directions[..., 1:], DUAL_MAP.weights)
  with pytest.raises(ValueError, match=r"dimension 3: got .* dimension 4"):
    asap_attention(QUERY, KEY, VALUE, dual_map=other)


@pytest.mark.parametrize("broadcast", [True, False])
@everyone
def test_dropout_drops_and_rescales(attend, broadcast):
  # The values are the identity: outputs are the weights themselves.
  value = jnp.broadcast_to(jnp.eye(M)[:, None], (BATCH, M, HEADS, M))
  rng, rate = jax.random.key(3), ("dropout_rate", 0.5)
  how = rate, ("broadcast_dropout", broadcast)
  weights = np.asarray(run(attend, QUERY, KEY, value))
  dropped = np.asarray(run(attend, QUERY, KEY, value, dropout_rng=rng, static=how))
  kept = dropped > 0
  np.testing.assert_allclose(dropped[kept], 2 * weights[kept], rtol=1e-5)
  assert 0.3 < kept.mean() < 0.7
  alike = (kept == kept[:1, :, :1]).all()
  assert alike == broadcast
  how = rate, ("deterministic", True)
  still = run(attend, QUERY, KEY, value, dropout_rng=rng, static=how)
  np.testing.assert_array_equal(still, weights)


@everyone
def test_dropout_without_a_key_is_refused(attend):
  with pytest.raises(ValueError, match=r"dropout_rng=None"):
    run(attend, QUERY, KEY, VALUE, static=(("dropout_rate", 0.5),))


def padded_tokens():
  valid = jnp.arange(N) < jnp.asarray([[N], [3]])
  x = normal(BATCH, N, 8)
  return x, jnp.where(valid[..., None], x, 7.0), valid


@everyone
def test_inside_nnx_attention_padding_does_not_leak(attend):
  layer = nnx.MultiHeadAttention(
    HEADS, 8, decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
  )
  x, other, valid = padded_tokens()
  mask = nnx.make_attention_mask(valid, valid)

  @nnx.jit
  def apply(layer, x, mask):
    sowing = nnx.capture(layer, nnx.Intermediate)
    return sowing(x, mask=mask, sow_weights=True)

  (out, sown), (same, _) = apply(layer, x, mask), apply(layer, other, mask)
  np.testing.assert_allclose(same[valid], out[valid], atol=1e-5)
  unmasked, _ = apply(layer, other, jnp.ones_like(mask))
  assert np.abs(unmasked[valid] - out[valid]).max() > 1e-2
  (weights,) = jax.tree.leaves(sown)
  assert weights.shape == (BATCH, HEADS, N, N)
  rows = weights.sum(-1)[:, 0]
  np.testing.assert_allclose(rows[valid], 1, atol=1e-5)


@everyone
def test_inside_linen_attention_the_mask_arrives(attend):
  # Linen passes only what the signature names, and is silent about the rest.
  layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attend)
  x, other, valid = padded_tokens()
  mask = linen.make_attention_mask(valid, valid)
  parameters = layer.init(jax.random.key(0), x)

  @jax.jit
  def apply(x, mask):
    return layer.apply(
      parameters, x, mask=mask, sow_weights=True, mutable=["intermediates"]
    )

  (out, sown), (same, _) = apply(x, mask), apply(other, mask)
  np.testing.assert_allclose(same[valid], out[valid], atol=1e-5)
  unmasked, _ = apply(other, jnp.ones_like(mask))
  assert np.abs(unmasked[valid] - out[valid]).max() > 1e-2
  (weights,) = jax.tree.leaves(sown)
  np.testing.assert_array_equal(weights[1, :, :, 3:], 0)


@everyone
def test_inside_linen_attention_dropout_arrives(attend):
  layer = linen.MultiHeadDotProductAttention(
    HEADS, attention_fn=attend, dropout_rate=0.5
  )
  x = normal(BATCH, N, 8)
  parameters = layer.init(jax.random.key(0), x, deterministic=True)

  @functools.partial(jax.jit, static_argnums=0)
  def apply(deterministic):
    rngs = {"dropout": jax.random.key(1)}
    return layer.apply(parameters, x, deterministic=deterministic, rngs=rngs)

  assert np.abs(apply(False) - apply(True)).max() > 1e-2


@doubly_stochastic
def test_mask_of_queries_alone_is_refused_when_lengths_agree(attend):
  with pytest.raises(ValueError, match=r"one side alone.*make_attention_mask"):
    attend(KEY, KEY, VALUE, mask=KEY_VALID[:, None, :, None])


@pytest.mark.parametrize(
  "shape", [(3, 1, N, M), (BATCH, 3, N, M), (BATCH, 1, N, 2), (1, BATCH, 1, N, M)]
)
@pytest.mark.parametrize("name", ["mask", "bias"])
@everyone
def test_masks_and_biases_that_do_not_broadcast_are_refused(attend, name, shape):
  given = {name: jnp.ones(shape, bool if name == "mask" else jnp.float32)}
  with pytest.raises(ValueError, match=rf"{name} has shape .*expected"):
    attend(QUERY, KEY, VALUE, **given)


@everyone
def test_what_is_to_be_added_is_no_mask(attend):
  additive = jnp.where(KEY_VALID, 0.0, -1e9)[:, None, None, :]
  with pytest.raises(ValueError, match=r"mask of dtype float32 .*passed as bias"):
    attend(QUERY, KEY, VALUE, mask=additive)
  ones = KEY_VALID[:, None, None, :].astype(jnp.float32)
  expected = run(attend, QUERY, KEY, VALUE, mask=ones > 0)
  # A constant of a jitted function, whose values are known.
  actual = jax.jit(lambda query: attend(query, KEY, VALUE, mask=ones))(QUERY)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@everyone
def test_rates_of_dropout_are_shares(attend):
  tokens, rng = (QUERY, KEY, VALUE), jax.random.key(0)
  for rate in (-0.5, 1.5, float("nan")):
    with pytest.raises(ValueError, match=r"dropout_rate=.*from 0 to 1"):
      attend(*tokens, dropout_rate=rate, dropout_rng=rng)

  def total(query):
    return attend(query, *tokens[1:], dropout_rate=1.0, dropout_rng=rng).sum()

  value, slope = jax.value_and_grad(total)(QUERY)
  assert value == 0
  np.testing.assert_array_equal(slope, 0)


@everyone
def test_integers_are_promoted(attend):
  integers = [(3 * x).astype(jnp.int32) for x in (QUERY, KEY, VALUE)]
  expected = run(attend, *(x.astype(jnp.float32) for x in integers))
  actual = run(attend, *integers)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@everyone
def test_a_traced_epsilon_has_a_gradient(attend):
  def total(epsilon):
    return (attend(QUERY, KEY, VALUE, epsilon=epsilon) ** 2).sum()

  slope = jax.jit(jax.grad(total))(0.7)
  high, low = (jax.jit(total)(0.7 + step) for step in (0.01, -0.01))
  np.testing.assert_allclose(slope, (high - low) / 0.02, rtol=1e-2)
  with pytest.raises(ValueError, match=r"epsilon=nan.*positive"):
    total(float("nan"))


@pytest.mark.parametrize("implementation", [None, "ott", "xla", "chunked"])
def test_double_precision_is_kept(implementation):
  with jax.enable_x64(True):
    query, key, value = (
      jnp.asarray(np.random.default_rng(i).normal(size=(1, N, HEADS, DIM)))
      for i in range(3)
    )
    attend = functools.partial(
      sinkhorn_attention, iterations=3, implementation=implementation
    )
    expected, _ = references.attention(query, key, value, 3)
    actual = attend(query, key, value)
    assert actual.dtype == jnp.float64
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    slope = jax.grad(lambda query: (attend(query, key, value) ** 2).sum())(query)
    assert slope.dtype == jnp.float64


@everyone
def test_nothing_to_attend_to_is_refused_and_a_batch_of_nothing_is_empty(attend):
  for query, key in (((2, 0), (2, M)), ((2, N), (2, 0))):
    tokens = (jnp.ones((*shape, HEADS, DIM)) for shape in (query, key, key))
    with pytest.raises(ValueError, match=r"query .*expected at least one token"):
      attend(*tokens)
  empty = (x[:0] for x in (QUERY, KEY, VALUE))
  mask = jnp.ones((0, 1, N, M), bool)
  assert attend(*empty, mask=mask).shape == (0, N, HEADS, DIM)
