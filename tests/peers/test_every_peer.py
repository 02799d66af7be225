"""What every peer must do: its paper's values and gradients, masks, dtypes, vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import peer_cases
from helpers.peer_cases import (
  CASES,
  COTANGENT,
  HEADS,
  QUERY_MASK,
  N,
  normal,
  sown_weights,
)

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_are_those_of_the_paper(case, masked):
  expected, _ = case.reference(*case.inputs, masked)
  actual = case(*case.inputs, mask=case.mask if masked else None)
  np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.slow
@each
def test_sown_weights_are_those_of_the_paper(case):
  function = functools.partial(
    peer_cases.ATTENTIONS[case.name], **case.options, **case.learned
  )
  _, expected = case.reference(*case.inputs, True)
  actual = sown_weights(function, *case.inputs, mask=case.mask)
  assert actual.dtype == jnp.float32
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
  "case", [case for case in CASES.values() if case.bias and case.name != "differential"]
)
def test_bias_and_scale(case):
  bias = normal(peer_cases.BATCH, HEADS, N, case.m)
  expected, _ = case.reference(*case.inputs, False, bias, scale=0.3 / 2.0)
  actual = case(*case.inputs, bias, scale=0.3, epsilon=2.0)
  np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.slow
@each
def test_gradient_against_finite_differences(case):
  point = (case.inputs, case.learned)
  slopes, _ = case.gradient(*point)
  leaves, structure = jax.tree.flatten(point)
  directions = [np.float64(normal(*x.shape)) for x in leaves]

  def loss(at, step):
    """The reference's, with one array moved along its direction."""
    moved = [np.asarray(x, np.float64) for x in leaves]
    moved[at] = moved[at] + step * directions[at]
    inputs, learned = jax.tree.unflatten(structure, moved)
    return np.vdot(case.reference(*inputs, True, learned=learned)[0], COTANGENT)

  expected = [(loss(i, 1e-5) - loss(i, -1e-5)) / 2e-5 for i in range(len(leaves))]
  actual = [
    np.vdot(slope, direction)
    for slope, direction in zip(jax.tree.leaves(slopes), directions, strict=True)
  ]
  np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4)
  assert abs(expected[2]) > 1e-2  # in the values, at least


@each
def test_padding_that_is_not_finite_reaches_no_value_and_no_gradient(case):
  masks = [x[..., None, None] for x in (QUERY_MASK, case.key_mask, case.key_mask)]

  def padded(content):
    pairs = zip(case.inputs, masks, strict=True)
    return tuple(jnp.where(keep, x, content) for x, keep in pairs)

  expected_slopes, expected = case.gradient(padded(0.0), case.learned)
  slopes, out = case.gradient(padded(jnp.nan), case.learned)
  np.testing.assert_array_equal(out, expected)
  np.testing.assert_array_equal(jnp.where(masks[0], 0.0, out), 0)
  jax.tree.map(np.testing.assert_array_equal, slopes, expected_slopes)
  for slope, keep in zip(slopes[0], masks, strict=True):
    np.testing.assert_array_equal(jnp.where(keep, 0.0, slope), 0)
  assert np.abs(slopes[0][2]).max() > 1e-2


@each
def test_sequence_without_valid_tokens(case):
  mask = case.mask.at[1].set(False)
  slopes, out = case.gradient(case.inputs, case.learned, mask)
  np.testing.assert_array_equal(out[1], 0)
  assert jnp.isfinite(out).all()
  assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))
  _, expected = case.gradient(case.inputs, case.learned)
  np.testing.assert_array_equal(out[0], expected[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES.values() if not c.ordered])
def test_permutations_of_queries_and_keys(case):
  query, key, value = case.inputs
  rows, columns = np.random.default_rng(1).permutation(N), np.arange(case.m)[::-1]
  expected = case(query, key, value)[:, rows]
  actual = case(query[:, rows], key[:, columns], value[:, columns])
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
@each
def test_half_precision(case):
  inputs = [x.astype(jnp.bfloat16) for x in case.inputs]
  actual = case(*inputs, mask=case.mask)
  assert actual.dtype == jnp.bfloat16
  expected, _ = case.reference(*(x.astype(jnp.float32) for x in inputs), True)
  # The plan is computed in float32: only weights, values and result are rounded. The
  # norm of the differential peer magnifies what is left where the maps cancel.
  tolerance = 5e-2 if case.name == "differential" else 2e-2
  np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.slow
@each
def test_vmap_agrees_with_the_batch(case):
  expected = case(*case.inputs, mask=case.mask)

  def one(query, key, value, mask):
    return case.function(query, key, value, mask=mask, **case.learned)

  actual = jax.vmap(one)(*case.inputs, case.mask)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esp hard", "differential"])
def test_eager_agrees_with_jit(name):
  case = CASES[name]
  eager = functools.partial(peer_cases.ATTENTIONS[case.name], **case.options)
  actual = eager(*case.inputs, mask=case.mask, **case.learned)
  expected = case(*case.inputs, mask=case.mask)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_dtype_is_that_of_inputs_converted():
  case = CASES["lot"]
  inputs = [x.astype(jnp.bfloat16) for x in case.inputs]
  by_dtype = case(*case.inputs, mask=case.mask, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(by_dtype, case(*inputs, mask=case.mask))


@pytest.mark.parametrize("name", ["lot", "differential"])
def test_dropout_is_that_of_the_weights(name):
  case = CASES[name]
  key = jax.random.key(0)
  given = {"mask": case.mask, "dropout_rng": key, "dropout_rate": 0.5}
  _, plans = case.reference(*case.inputs, True)
  keep = jax.random.bernoulli(key, 0.5, (1, 1, *plans.shape[-2:]))
  dropped = np.where(keep, plans / 0.5, 0.0)
  value = np.float64(jnp.where(case.key_mask[..., None, None], case.inputs[2], 0.0))
  out = np.einsum("bhnm,bmhv->bnhv", dropped, value)
  expected = case.finish(out, **case.learned)
  np.testing.assert_allclose(case(*case.inputs, **given), expected, atol=1e-4)
  still = case(*case.inputs, **given, deterministic=True)
  np.testing.assert_array_equal(still, case(*case.inputs, mask=case.mask))


@each
def test_causal_use(case):
  inputs = [x[:, :N] for x in case.inputs]
  if case.name == "differential":
    assert jnp.isfinite(case(*inputs, is_causal=True)).all()
  else:
    with pytest.raises(ValueError, match="is_causal=True"):
      case(*inputs, is_causal=True)
