"""The one signature, as Flax's layers see it, and the names of the peers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers.peer_cases import CASES, HEADS, PIVOT, N, normal

from asap_jax import sinkhorn_attention, softmax_attention
from asap_jax.attention.signature import answering
from asap_jax.peers import ATTENTIONS, attention_named, esp_attention, lot_attention

WIDTH = 8
X = normal(2, N, WIDTH)
VALID = jnp.arange(N) < jnp.asarray([[N], [4]])
MASK = nnx.make_attention_mask(VALID, VALID)
PADDED = jnp.where(VALID[..., None], X, 7.0)
INPUTS = [normal(1, N, HEADS, WIDTH // HEADS) for _ in range(3)]


def bound(case):
  """The attention function as a user binds it."""
  learned = dict(case.learned)
  if "parameters" in learned:
    gain = jnp.ones(WIDTH // HEADS)
    learned["parameters"] = learned["parameters"]._replace(gain=gain)
  return attention_named(case.name, **case.options, **learned)


def assert_mask_arrives(apply):
  """Content of padding reaches valid tokens without the mask, and not with it."""
  masked, padded, seen = apply(X, MASK), apply(PADDED, MASK), apply(PADDED, None)
  np.testing.assert_allclose(padded[VALID], masked[VALID], atol=1e-5)
  assert np.abs(seen[1, :4] - masked[1, :4]).max() > 1e-2
  return masked


each = pytest.mark.parametrize(
  "case", [CASES["est"], CASES["differential"]], ids=["outer product", "any mask"]
)


@each
def test_masks_of_nnx_arrive(case):
  layer = nnx.MultiHeadAttention(
    HEADS, WIDTH, decode=False, attention_fn=bound(case), rngs=nnx.Rngs(0)
  )
  call = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
  assert_mask_arrives(lambda x, mask: call(layer, x, mask))


@each
def test_masks_of_linen_arrive(case):
  layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=bound(case))
  call = jax.jit(lambda params, x, mask: layer.apply(params, x, mask=mask))
  params = jax.jit(layer.init)(jax.random.key(0), X)
  assert_mask_arrives(lambda x, mask: call(params, x, mask))


def test_weights_are_sown_in_linen_and_in_nnx():
  function = attention_named("lot", pivot=PIVOT)
  layer = linen.MultiHeadDotProductAttention(HEADS, attention_fn=function)
  params = jax.jit(layer.init)(jax.random.key(0), X)
  _, state = layer.apply(params, X, sow_weights=True, mutable=["intermediates"])
  (weights,) = jax.tree.leaves(state)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)

  layer = nnx.MultiHeadAttention(
    HEADS, WIDTH, decode=False, attention_fn=function, rngs=nnx.Rngs(0)
  )
  sowing = nnx.capture(layer, nnx.Intermediate)
  _, state = sowing(X, sow_weights=True)
  (weights,) = jax.tree.leaves(state)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_signature_begins_as_that_of_softmax(name):
  common = list(inspect.signature(softmax_attention).parameters.values())
  own = list(inspect.signature(ATTENTIONS[name]).parameters.values())
  positional = [p for p in common if p.kind is p.POSITIONAL_OR_KEYWORD]
  for expected, actual in zip(positional, own, strict=False):
    assert actual.replace(annotation=None) == expected.replace(annotation=None)
  assert {"scale", "epsilon"} <= {p.name for p in own[len(positional) :]}
  assert all(p.kind is p.KEYWORD_ONLY for p in own[len(positional) :])
  assert "Args:" in ATTENTIONS[name].__doc__


def test_unknown_and_missing_arguments_are_named():
  with pytest.raises(TypeError, match="'pivot'"):
    lot_attention(*INPUTS)
  with pytest.raises(TypeError, match="'tau'"):
    esp_attention(*INPUTS, tau=1.0)


def test_arguments_of_linen_that_are_not_supported_are_refused():
  with pytest.raises(ValueError, match=r"einsum_dot_general: not supported by esp_a"):
    esp_attention(*INPUTS, einsum_dot_general=jnp.einsum)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_one_token_decoding(name):
  inputs = [INPUTS[0][:, :1], *INPUTS[1:]]
  learned = {
    "lot": {"pivot": PIVOT},
    "differential": CASES["differential"].learned,
  }.get(name, {})
  if name == "differential":
    learned = {"parameters": learned["parameters"]._replace(gain=jnp.ones(4))}
  function = attention_named(name, **learned)
  if name in ("softmax", "differential"):
    assert jnp.isfinite(function(*inputs)).all()
  else:
    with pytest.raises(ValueError, match="query has one token, key 6"):
      function(*inputs)


def test_names():
  assert attention_named("esp") is esp_attention
  for name, options in {
    "sinkhorn@3": {"iterations": 3, "start": "zero"},
    "gaussian@3": {"iterations": 3, "start": "gaussian"},
    "gaussian@0": {"iterations": 0, "start": "gaussian"},
  }.items():
    partial = attention_named(name, epsilon=0.5)
    assert isinstance(partial, functools.partial)
    assert partial.func is sinkhorn_attention
    assert partial.keywords == {**options, "epsilon": 0.5}


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("sinkhron", {}, r"name='sinkhron': expected one of softmax, .*mean 'sinkhorn'\?"),
    ("zzz", {}, r"name='zzz': expected one of .*sinkhorn@k, gaussian@k$"),
    ("gausian@k", {}, r"did you mean 'gaussian@k'\?"),
    ("gaussian", {}, r"name='gaussian': expected one of"),
    ("gaussian@", {}, r"name='gaussian@': expected gaussian@k with k = 0, 1"),
    ("gaussian@-1", {}, r"name='gaussian@-1': expected gaussian@k"),
    ("gaussian@2", {"start": "zero"}, r"start=zero: 'gaussian@2' says it already"),
    ("sinkhorn@", {}, r"name='sinkhorn@': expected sinkhorn@k with k = 1, 2"),
    ("sinkhorn@0", {}, r"name='sinkhorn@0'"),
    ("esp@2", {}, r"name='esp@2': expected one of"),
    ("sinkhorn@2", {"iterations": 3}, r"iterations=3: 'sinkhorn@2' says it already"),
    ("esp", {"tau": 1.0}, r"tau: esp takes .*inverse_temperature"),
  ],
)
def test_names_and_options_that_are_unknown(name, options, message):
  with pytest.raises(ValueError, match=message):
    attention_named(name, **options)


def test_calls_are_answered_by_another_or_left_and_its_own_are_not():
  heard = []

  def answer(name, given):
    heard.append((name, given["mask"], given.get("iterations")))
    if name != "sinkhorn_attention":
      return None
    return 2.0 * sinkhorn_attention(**given)  # asks nobody

  wanted = sinkhorn_attention(*INPUTS, iterations=2), softmax_attention(*INPUTS)
  with answering(answer):
    first = sinkhorn_attention(*INPUTS, iterations=2)
    second = softmax_attention(*INPUTS, is_causal=False)
  np.testing.assert_allclose(first, 2.0 * wanted[0], rtol=1e-6)
  np.testing.assert_array_equal(second, wanted[1])
  assert heard == [("sinkhorn_attention", None, 2), ("softmax_attention", None, None)]
  np.testing.assert_array_equal(sinkhorn_attention(*INPUTS, iterations=2), wanted[0])
