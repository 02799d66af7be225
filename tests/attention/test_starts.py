"""Sinkhorn attention from the Gaussian start: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import gaussian_references, oracles
from scipy.special import softmax

from asap_jax import sinkhorn_attention
from asap_jax.metrics import column_error
from asap_jax.teacher import starting_dual

BATCH, N, M, HEADS, DIM, VALUES = 2, 6, 9, 2, 5, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY = 2 * normal(BATCH, N, HEADS, DIM) + 0.5
KEY, VALUE = 1.5 * normal(BATCH, M, HEADS, DIM), normal(BATCH, M, HEADS, VALUES)
BIAS = normal(BATCH, HEADS, N, M)
COTANGENT = np.float64(normal(BATCH, N, HEADS, VALUES))
QUERY_MASK = jnp.asarray([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]], bool)
KEY_MASK = jnp.arange(M) < jnp.asarray([[7], [5]])
MASK = nnx.make_attention_mask(QUERY_MASK, KEY_MASK)
MASKS = np.asarray(QUERY_MASK), np.asarray(KEY_MASK)

STATIC = (
  "iterations", "implementation", "start", "relaxation", "scale", "epsilon"
)  # fmt: skip
attend = jax.jit(sinkhorn_attention, static_argnames=STATIC)
gaussian = functools.partial(attend, start="gaussian")
dual = jax.jit(starting_dual, static_argnums=0, static_argnames="side")
each = pytest.mark.parametrize("implementation", ["ott", "xla", "chunked"])


def by_head(query, key, value, masks, scale):
  """Indices of batch and head, with their scaled queries, keys, values and masks."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  groups = query.shape[2] // key.shape[2]
  for b, h in np.ndindex(query.shape[0], query.shape[2]):
    own = [None if mask is None else mask[b] for mask in masks]
    kv = h // groups
    yield (b, h), (scale * query[b, :, h], key[b, :, kv], value[b, :, kv], own)


def start_in_float32(q, k, masks, side, start):
  """As the package has it: tests of potentials compare it with float64."""
  weights = [None if mask is None else jnp.asarray(mask) for mask in masks]
  points = jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
  return np.float64(dual(start, *points, *weights, side=side))


def reference(
  query, key, value, iterations, *, masks=(None, None), bias=None, relaxation=1.0,
  start="gaussian", scale=DIM**-0.5, starts=start_in_float32,
):  # fmt: skip
  """The outputs: plain iterations in the log domain, one head at a time."""
  out = np.zeros((*query.shape[:3], value.shape[-1]))
  for (b, h), (q, k, v, own) in by_head(query, key, value, masks, scale):
    logits = q @ k.T + (0.0 if bias is None else np.asarray(bias[b, h]))
    if iterations == 0:
      g = starts(q, k, own, "key", start)
      rows, columns = (
        oracles.present(w, size) for w, size in zip(own, logits.shape, strict=True)
      )
      plan = np.zeros_like(logits)
      plan[np.ix_(rows, columns)] = softmax((logits + g)[np.ix_(rows, columns)], axis=1)
    else:
      f = starts(q, k, own, "query", start)
      omegas = [relaxation] * (iterations - 1)
      duals = oracles.closures(logits, f, iterations, *own, omegas)
      plan = oracles.plan(logits, *duals, *own)
    out[b, :, h] = plan @ v
  return out


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
@each
def test_iterations_from_the_start(implementation, masked, iterations):
  masks = MASKS if masked else (None, None)
  expected = reference(QUERY, KEY, VALUE, iterations, masks=masks)
  options = {"iterations": iterations, "implementation": implementation}
  actual = gaussian(QUERY, KEY, VALUE, mask=MASK if masked else None, **options)
  np.testing.assert_allclose(actual, expected, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [5, 12])
@each
def test_many_iterations_from_the_start(implementation, iterations):
  expected = reference(QUERY, KEY, VALUE, iterations, masks=MASKS)
  options = {"iterations": iterations, "implementation": implementation}
  actual = gaussian(QUERY, KEY, VALUE, mask=MASK, **options)
  np.testing.assert_allclose(actual, expected, atol=3e-5)


@pytest.mark.parametrize(
  "start", ["gaussian_diagonal", pytest.param("gaussian_full", marks=pytest.mark.slow)]
)
def test_every_start_is_passed_on(start):
  found = [attend(QUERY, KEY, VALUE, iterations=k, start=start) for k in (0, 1)]
  for iterations, actual in enumerate(found):
    expected = reference(QUERY, KEY, VALUE, iterations, start=start)
    np.testing.assert_allclose(actual, expected, atol=3e-5)
    other = reference(QUERY, KEY, VALUE, iterations)
    assert np.abs(actual - other).max() > 1e-3


@pytest.mark.parametrize("iterations", [0, 2])
def test_scale_epsilon_and_bias(iterations):
  expected = reference(QUERY, KEY, VALUE, iterations, bias=BIAS, scale=0.3 / 0.5)
  options = {"iterations": iterations, "scale": 0.3, "epsilon": 0.5}
  actual = gaussian(QUERY, KEY, VALUE, BIAS, **options)
  np.testing.assert_allclose(actual, expected, atol=3e-5)


@pytest.mark.parametrize("iterations", [0, 2])
def test_grouped_keys(iterations):
  query = normal(BATCH, N, 2 * HEADS, DIM)
  expected = reference(query, KEY, VALUE, iterations, masks=MASKS)
  actual = gaussian(query, KEY, VALUE, mask=MASK, iterations=iterations)
  np.testing.assert_allclose(actual, expected, atol=3e-5)


@pytest.mark.parametrize(
  "start", ["gaussian", pytest.param("zero", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_relaxation_between_iterations(implementation, start):
  options = {"relaxation": 1.5, "start": start}
  starts = start_in_float32 if start == "gaussian" else lambda q, *_: np.zeros(len(q))
  expected = reference(QUERY, KEY, VALUE, 4, masks=MASKS, starts=starts, relaxation=1.5)
  actual = attend(
    QUERY, KEY, VALUE, mask=MASK, iterations=4, implementation=implementation, **options
  )
  np.testing.assert_allclose(actual, expected, atol=3e-5)
  plain = reference(QUERY, KEY, VALUE, 4, masks=MASKS, starts=starts)
  assert np.abs(plain - expected).max() > 1e-3


@pytest.mark.slow
def test_relaxation_is_nothing_to_a_single_iteration():
  one, other = (
    gaussian(QUERY, KEY, VALUE, iterations=1, implementation="xla", relaxation=omega)
    for omega in (1.0, 1.5)
  )
  np.testing.assert_allclose(one, other, atol=1e-6)


def start_in_float64(q, k, masks, side, start):
  covariances = start.removeprefix("gaussian_")
  return gaussian_references.potential(q, k, masks, covariances, side=side)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("implementation", "iterations"),
  [
    ("ott", 2),
    ("xla", 0),
    pytest.param("ott", 1, marks=pytest.mark.slow),
    pytest.param("xla", 2, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize(
  "start", ["gaussian_full", pytest.param("gaussian_diagonal", marks=pytest.mark.slow)]
)
def test_gradient_flows_through_the_start(start, implementation, iterations):
  options = {"iterations": iterations, "start": start}

  def loss(*inputs):
    out = sinkhorn_attention(
      *inputs, mask=MASK, implementation=implementation, **options
    )
    return jnp.vdot(out, jnp.asarray(COTANGENT, jnp.float32))

  slopes = jax.jit(jax.grad(loss, (0, 1, 2)))(QUERY, KEY, VALUE)
  inputs = [np.float64(x) for x in (QUERY, KEY, VALUE)]
  for at, slope in enumerate(slopes):
    direction = np.random.default_rng(at).normal(size=inputs[at].shape)

    def along(step, starts, at=at, direction=direction):
      moved = list(inputs)
      moved[at] = moved[at] + step * direction
      out = reference(*moved, masks=MASKS, starts=starts, **options)
      return np.vdot(out, COTANGENT)

    def difference(starts, along=along):
      return (along(1e-5, starts) - along(-1e-5, starts)) / 2e-5

    expected = difference(start_in_float64)
    np.testing.assert_allclose(np.vdot(slope, direction), expected, rtol=2e-3)
    if at < 2:
      # A start that stands still has another slope.
      held = {
        index: start_in_float64(q, k, own, "key" if iterations == 0 else "query", start)
        for index, (q, k, _, own) in by_head(*inputs, MASKS, DIM**-0.5)
      }
      kept = iter([*held.values()] * 2)
      still = difference(lambda *_, kept=kept: next(kept))
      assert abs(still - expected) > 0.02 * abs(expected)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_padding_that_is_not_finite_reaches_no_value_and_no_gradient(iterations):
  masks = [mask[..., None, None] for mask in (QUERY_MASK, KEY_MASK, KEY_MASK)]
  keep = jnp.asarray(COTANGENT, jnp.float32)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
  def slopes(*inputs):
    out = sinkhorn_attention(
      *inputs, mask=MASK, start="gaussian", iterations=iterations
    )
    return jnp.vdot(out, keep), out

  def padded(content):
    inputs = zip((QUERY, KEY, VALUE), masks, strict=True)
    return [jnp.where(mask, x, content) for x, mask in inputs]

  expected_slopes, expected = slopes(*padded(0.0))
  actual_slopes, actual = slopes(*padded(jnp.nan))
  np.testing.assert_array_equal(actual, expected)
  np.testing.assert_array_equal(jnp.where(masks[0], 0.0, actual), 0.0)
  for one, other, mask in zip(actual_slopes, expected_slopes, masks, strict=True):
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(jnp.where(mask, 0.0, one), 0.0)
    assert jnp.isfinite(one).all()
    assert jnp.abs(one).max() > 1e-2


def column_errors(query, key, **options):
  """The largest of each plan, which is its product with the unit vectors."""
  m = key.shape[1]
  unit = jnp.broadcast_to(jnp.eye(m)[:, None], (*key.shape[:3], m))
  plans = jnp.moveaxis(attend(query, key, unit, **options), 2, 1)
  np.testing.assert_allclose(plans.sum(-1), 1.0, atol=1e-4)
  return float(column_error(plans).mean())


@pytest.mark.slow
def test_columns_are_far_better_than_from_zero_where_logits_are_sharp():
  rng = np.random.default_rng(3)
  skew = rng.normal(size=(2, DIM, DIM))
  query, key = (
    jnp.asarray(scale * rng.normal(size=(1, size, 2, DIM)) @ each + 0.5, jnp.float32)
    for scale, size, each in ((3.0, 48, skew[0]), (1.0, 64, skew[1]))
  )
  assert jnp.abs(jnp.einsum("bnhd,bmhd->bhnm", query, key)).max() * DIM**-0.5 > 30
  errors = {
    (start, count): column_errors(
      query, key, start=start, iterations=count, implementation="xla"
    )
    for start, count in (
      *(("zero", k) for k in (1, 2, 3)),
      *(("gaussian_full", k) for k in (0, 1, 2, 3)),
    )
  }
  for count in (1, 2, 3):
    assert errors["gaussian_full", count] < 0.4 * errors["zero", count]
  # Half an iteration is better than a whole one from zero.
  assert errors["gaussian_full", 0] < errors["zero", 1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"iterations": 0}, r"iterations=0 from start='zero': that is softmax_attention"),
    ({"iterations": -1, "start": "gaussian"}, r"iterations=-1: expected a number"),
    ({"start": "gauss"}, r"start='gauss': expected one of zero, gaussian, "),
    ({"relaxation": 0.9, "implementation": "xla"}, r"relaxation=0.9: expected .* 1 to"),
    ({"relaxation": 2.0, "implementation": "xla"}, r"relaxation=2.0: expected"),
    (
      {"relaxation": 1.5, "implementation": "ott"},
      r"relaxation=1.5 with implementation='ott'",
    ),
    ({"tolerance": -1.0}, r"tolerance=-1.0: expected None or a float above zero"),
    ({"tolerance": 1}, r"tolerance=1: expected None or a float above zero"),
    (
      {"tolerance": 0.1, "relaxation": 1.5},
      r"tolerance=0.1 with iterations=20, relaxation=1.5: expected at least one",
    ),
    (
      {"tolerance": 0.1, "iterations": 0, "start": "gaussian"},
      r"tolerance=0.1 with iterations=0, .*: expected at least one",
    ),
    (
      {"tolerance": 0.1, "implementation": "ott"},
      r"implementation='ott' with tolerance=0.1: expected None, 'xla' or 'chunked'",
    ),
    (
      {"tolerance": 0.1, "implementation": "chunked", "bias": BIAS},
      r"tolerance with a bias and implementation='chunked'",
    ),
    ({"implementation": "scaling", "start": "gaussian"}, r"implementation='scaling'"),
    (
      {"implementation": "cudnn", "start": "gaussian", "iterations": 0},
      r"implementation='cudnn' cannot serve: ",
    ),
  ],
)
def test_options_that_make_no_sense(unchecked, options, message):
  with pytest.raises(ValueError, match=message):
    sinkhorn_attention(QUERY, KEY, VALUE, **options)


@pytest.mark.parametrize("iterations", [0, 2])
def test_low_precision(iterations):
  inputs = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
  actual = gaussian(*inputs, mask=MASK, iterations=iterations)
  assert actual.dtype == jnp.bfloat16
  exact = [x.astype(jnp.float32) for x in inputs]
  expected = reference(*exact, iterations, masks=MASKS)
  np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 2])
def test_vmap_agrees_with_the_batch(iterations):
  def one(query, key, value, mask):
    return gaussian(query, key, value, mask=mask, iterations=iterations)

  expected = one(QUERY, KEY, VALUE, MASK)
  actual = jax.vmap(one)(QUERY, KEY, VALUE, MASK)
  np.testing.assert_allclose(actual, expected, atol=1e-5)
