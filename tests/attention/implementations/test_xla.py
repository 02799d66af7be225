"""Values under scaled plans, whole and in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import references

from asap_jax.attention.implementations import blocks as in_blocks
from asap_jax.attention.implementations import xla_short
from asap_jax.attention.implementations.xla import scaled_attention
from asap_jax.attention.inputs import Activation
from asap_jax.dual_map import DualMap, predict_dual

BATCH, HEADS, N, M, DIM, VALUES = 3, 2, 6, 9, 4, 3
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE, F, BIAS, G = (
  jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, *shape)), jnp.float32)
  for shape in ((N, DIM), (M, DIM), (M, VALUES), (N,), (N, M), (M,))
)
QUERY_MASK = jnp.arange(N) < jnp.asarray([4, 6, 5])[:, None, None]
KEY_MASK = jnp.arange(M) < jnp.asarray([9, 3, 7])[:, None, None]
MASKS = {"query_weights": QUERY_MASK, "key_weights": KEY_MASK}
MASSES = {
  name: jnp.asarray(RANDOM.uniform(0.1, 2.0, size=mask.shape), jnp.float32) * mask
  for name, mask in MASKS.items()
}
OMEGA = jnp.asarray([[1.5], [0.8]])


def expected(count, masks, bias=None, relaxation=None):
  return references.closed_values(
    QUERY, KEY, VALUE, F, count, *masks.values(), bias=bias, relaxation=relaxation
  )


@pytest.fixture(params=["short", "whole", "blocks", "single", "elsewhere"])
def blocks(request, monkeypatch):
  """All at once, or blocks of four heads, which no batch of six divides into.

  `elsewhere` is the form of other devices than a CPU.
  """
  if request.param == "elsewhere":

    def platform_dependent(*arguments, default, **_):
      return default(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", platform_dependent)
  if request.param != "short":
    monkeypatch.setattr(xla_short, "_SHORT", 0)
  size = {"blocks": 4 * N * M, "single": 1}.get(request.param, 2**20)
  monkeypatch.setattr(in_blocks, "_PAIRS", size)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("weights", [{}, MASKS, MASSES], ids=["all", "masks", "masses"])
@pytest.mark.parametrize("count", [1, 2])
def test_against_float64(weights, count):
  relaxation = OMEGA if count == 2 else None
  options = {**weights, "relaxation": relaxation}
  function = jax.jit(lambda *a: scaled_attention(*a, count, **options))
  actual = function(QUERY, KEY, VALUE, F)
  wanted = expected(count, weights, relaxation=relaxation)
  np.testing.assert_allclose(actual, wanted, atol=2e-5)


STEPS = {
  "momentum": (
    3,
    {
      "relaxation": jnp.asarray([[1.5, 1.1], [0.8, 1.3]]),
      "momentum": jnp.asarray([[0.7, 0.5], [0.0, -0.4]]),
    },
  ),
  "half": (0, {"side": "key"}),
  "key": (2, {"side": "key", "relaxation": OMEGA}),
}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("case", STEPS)
def test_momentum_and_the_key_side_against_float64(case):
  count, options = STEPS[case]
  dual = G if options.get("side") == "key" else F
  function = jax.jit(lambda *a: scaled_attention(*a, count, **MASSES, **options))
  wanted = references.closed_values(
    QUERY, KEY, VALUE, dual, count, *MASSES.values(), **options
  )
  np.testing.assert_allclose(function(QUERY, KEY, VALUE, dual), wanted, atol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_bias_may_hold_anything_at_padding(count):
  pairs = QUERY_MASK[..., :, None] & KEY_MASK[..., None, :]
  bias = jnp.asarray(np.random.default_rng(1).normal(size=(N, M)), jnp.float32)
  found, wanted = (
    scaled_attention(
      QUERY, KEY, VALUE, F, count, **MASKS, bias=jnp.where(pairs, bias, filling)
    )
    for filling in (jnp.nan, 0.0)
  )
  np.testing.assert_array_equal(found, wanted)


def test_what_the_dual_holds_at_padding_reaches_no_gradient():
  count, options = STEPS["momentum"]

  @jax.jit
  @jax.grad
  def slopes(point):
    f, factors = point
    out = scaled_attention(QUERY, KEY, VALUE, f, count, **MASKS, **factors)
    return jnp.square(out).sum()

  absent = ~jnp.broadcast_to(QUERY_MASK, F.shape)
  found, expected = (
    slopes((jnp.where(absent, filling, F), options)) for filling in (jnp.nan, 0.0)
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert np.abs(expected[1]["momentum"][:, 1]).min() > 1e-3
  np.testing.assert_array_equal(expected[1]["momentum"][:, 0], 0)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="momentum has shape"):
    scaled_attention(QUERY, KEY, VALUE, F, 2, momentum=jnp.ones((HEADS, 2)))
  with pytest.raises(ValueError, match="side='keys'"):
    scaled_attention(QUERY, KEY, VALUE, F, side="keys")
  with pytest.raises(ValueError, match="count=0: expected at least 1 from the query"):
    scaled_attention(QUERY, KEY, VALUE, F, 0)


@pytest.mark.parametrize("blocks", ["short", "single"], indirect=True)
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("masks", [{}, MASKS], ids=["all", "masks"])
def test_sharp_logits(masks):
  query, f = 300 * QUERY, 100 * F
  assert float(jnp.abs(jnp.einsum("bhnd,bhmd->bhnm", query, KEY)).max()) > 1000
  actual = jax.jit(lambda *a: scaled_attention(*a, **masks))(query, KEY, VALUE, f)
  wanted = references.closed_values(query, KEY, VALUE, f, 1, *masks.values())
  # Logits of thousands are known to a ten-thousandth.
  np.testing.assert_allclose(actual, wanted, atol=2e-3)


@pytest.mark.parametrize("blocks", ["short", "single"], indirect=True)
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("absent", ["queries", "keys", "both"])
def test_nobody_present(absent):
  masks = {
    "query_weights": QUERY_MASK & (absent == "keys"),
    "key_weights": KEY_MASK & (absent == "queries"),
  }

  @jax.jit
  @jax.value_and_grad
  def loss(arguments):
    return jnp.square(scaled_attention(*arguments, **masks)).sum()

  value, slopes = loss((QUERY, KEY, VALUE, F))
  assert value == 0.0
  assert all(jnp.all(slope == 0.0) for slope in slopes)


@pytest.mark.parametrize("blocks", ["short", "single"], indirect=True)
@pytest.mark.usefixtures("blocks")
def test_values_in_bfloat16():
  value = VALUE.astype(jnp.bfloat16)
  actual = jax.jit(lambda *a: scaled_attention(*a, **MASKS))(QUERY, KEY, value, F)
  assert actual.dtype == jnp.bfloat16
  # Each of the weights, and the sums, rounded to eight bits.
  np.testing.assert_allclose(
    actual.astype(jnp.float32), expected(1, MASKS), rtol=2e-2, atol=2e-2
  )


@pytest.mark.parametrize("blocks", ["short", "single"], indirect=True)
@pytest.mark.usefixtures("blocks")
def test_constants_in_f_change_nothing():
  shifted = F + 7.0 * jnp.arange(BATCH)[:, None, None]
  attend = jax.jit(lambda f: scaled_attention(QUERY, KEY, VALUE, f, **MASKS))
  np.testing.assert_allclose(attend(shifted), attend(F), atol=2e-5)


@pytest.mark.usefixtures("blocks")
def test_bias_against_float64():
  # One bias for the whole batch.
  actual = jax.jit(scaled_attention)(QUERY, KEY, VALUE, F, bias=BIAS[:1])
  bias = jnp.broadcast_to(BIAS[:1], BIAS.shape)
  np.testing.assert_allclose(actual, expected(1, {}, bias), atol=2e-5)


@pytest.mark.usefixtures("blocks")
def test_gradients_agree_with_finite_differences():
  cotangent = RANDOM.normal(size=(BATCH, HEADS, N, VALUES))

  def loss(arguments):
    return jnp.vdot(cotangent, scaled_attention(*arguments, **MASKS))

  arguments = (QUERY, KEY, VALUE, F)
  tangents = [jnp.asarray(RANDOM.normal(size=a.shape), jnp.float32) for a in arguments]
  slopes = jax.jit(jax.grad(loss))(arguments)
  run, step = jax.jit(loss), 1e-2
  for place, tangent in enumerate(tangents):
    ends = [
      run([a + s * tangent if i == place else a for i, a in enumerate(arguments)])
      for s in (step, -step)
    ]
    difference = (ends[0] - ends[1]) / (2 * step)
    actual = jnp.vdot(slopes[place], tangent)
    np.testing.assert_allclose(actual, difference, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("blocks")
def test_vmap_agrees_with_the_batch():
  arguments = (QUERY, KEY, VALUE, F)
  mapped = jax.jit(jax.vmap(scaled_attention))(*arguments)
  np.testing.assert_allclose(mapped, scaled_attention(*arguments), atol=1e-5)


@pytest.mark.parametrize(
  ("masked", "options"),
  [
    (False, {}),
    (True, {"relaxation": OMEGA}),
    (True, STEPS["momentum"][1] | {"side": "key"}),
    (True, {"side": "key", "half": True}),
  ],
  ids=["all", "masks", "key and momentum", "half"],
)
def test_prediction_fused_with_closures_is_the_same(masked, options):
  dual_map = DualMap(
    jnp.asarray(RANDOM.normal(size=(HEADS, 2, DIM)), jnp.float32),
    jnp.asarray(0.3 * RANDOM.normal(size=(HEADS, 2 + DIM + 2)), jnp.float32),
    **options,
  )
  masks = tuple(MASKS.values()) if masked else (None, None)

  def fused(query, key):
    seen = Activation(query, key, BIAS, *masks)
    return xla_short.predicted_values(dual_map, seen, VALUE)

  def in_steps(query, key):
    f = predict_dual(dual_map, query, key, *masks)
    options = {"bias": BIAS, **dual_map.steps}
    return scaled_attention(query, key, VALUE, f, dual_map.closures, *masks, **options)

  def both(function):
    loss = lambda q, k: jnp.square(function(q, k)).sum()  # noqa: E731
    return function(QUERY, KEY), jax.grad(loss, (0, 1))(QUERY, KEY)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
    jax.jit(lambda: both(fused))(),
    jax.jit(lambda: both(in_steps))(),
  )
