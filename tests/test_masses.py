import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax import masses

MASK = np.array([True, False, True, True, False])
MASSES = np.array([2.0, 0.0, 0.5, 3.0, 1.0], np.float32)


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (np.ones(5, np.int32), "dtype int32"),
    (np.ones(4, np.float32), "expected .*5"),
    (np.ones((5, 1), bool), "expected .*5"),
    (np.float32(1.0), "expected .*5"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_weights_that_do_not_fit_are_refused(bad, message):
  with pytest.raises(ValueError, match=f"key_weights has .*{message}"):
    masses.check_weights("key_weights", jnp.asarray(bad), 5)


@pytest.mark.parametrize("good", [None, MASK, MASSES, np.tile(MASSES, (2, 3, 1))])
def test_weights_that_fit_are_accepted(good):
  good = None if good is None else jnp.asarray(good)
  assert masses.check_weights("key_weights", good, 5) is None


def test_valid_points_are_those_with_mass():
  assert masses.valid(None) is None
  np.testing.assert_array_equal(masses.valid(jnp.asarray(MASK)), MASK)
  expected = [True, False, True, True, True]
  np.testing.assert_array_equal(masses.valid(jnp.asarray(MASSES)), expected)


@pytest.mark.parametrize("given", [MASK, MASSES, 100 * MASSES])
def test_masses_are_proportional_and_sum_to_one(given):
  expected = given.astype(np.float64) / given.astype(np.float64).sum()
  mass = masses.normalised(jnp.asarray(given), 5)
  np.testing.assert_allclose(mass, expected, rtol=1e-6)


def test_masses_without_weights_are_equal():
  np.testing.assert_allclose(masses.normalised(None, 8), np.full(8, 1 / 8))


def test_masses_are_normalised_per_row_and_null_rows_stay_null():
  given = jnp.asarray([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
  np.testing.assert_allclose(masses.normalised(given, 3), [[0.25, 0.75, 0], [0, 0, 0]])
  none = jnp.zeros((2, 3), bool)
  np.testing.assert_array_equal(masses.normalised(none, 3), np.zeros((2, 3)))


def test_masses_of_half_precision_weights_are_float32():
  # 300 ones do not add up to 300 in bfloat16.
  mass = masses.normalised(jnp.ones(300, jnp.bfloat16), 300)
  assert mass.dtype == jnp.float32
  np.testing.assert_allclose(mass, np.full(300, 1 / 300), rtol=1e-6)


@pytest.mark.parametrize("axis", [-1, -2])
def test_zero_invalid_along_an_axis(axis):
  values = np.arange(1.0, 26.0, dtype=np.float32).reshape(5, 5)
  expected = values.copy()
  expected[(slice(None), ~MASK) if axis == -1 else ~MASK] = 0
  actual = masses.zero_invalid(jnp.asarray(values), jnp.asarray(MASK), axis)
  np.testing.assert_array_equal(actual, expected)
  unweighted = masses.zero_invalid(jnp.asarray(values), None, axis)
  np.testing.assert_array_equal(unweighted, values)


def test_zero_invalid_keeps_the_dtype_and_stops_what_is_not_finite():
  values = jnp.where(jnp.asarray(MASK), 1.0, jnp.nan).astype(jnp.bfloat16)
  actual = masses.zero_invalid(values, jnp.asarray(MASK))
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_array_equal(actual.astype(jnp.float32), MASK)
  slope = jax.grad(lambda v: masses.zero_invalid(v, jnp.asarray(MASK)).sum())
  np.testing.assert_array_equal(slope(values).astype(jnp.float32), MASK)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("given", [None, MASK, MASSES], ids=["equal", "mask", "mass"])
def test_mean_and_centre_against_numpy(given, axis):
  values = np.random.default_rng(0).normal(size=(2, 5, 5)).astype(np.float32)
  expected = np.average(values.astype(np.float64), axis, given, keepdims=True)
  centred = values - expected
  if given is not None:
    centred *= np.expand_dims(given > 0, -1) if axis == -2 else given > 0
    given = jnp.asarray(given)
  actual = masses.mean(jnp.asarray(values), given, axis)
  np.testing.assert_allclose(actual, expected, atol=1e-6)
  actual = masses.centre(jnp.asarray(values), given, axis)
  np.testing.assert_allclose(actual, centred, atol=1e-6)


@pytest.mark.parametrize("given", [MASK, MASSES], ids=["mask", "mass"])
@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_centre_ignores_absent_points_in_value_and_gradient(given, hole):
  mass = given / given.sum(dtype=np.float64)
  values = np.where(given > 0, np.arange(5.0, dtype=np.float32), hole)
  values, given = jnp.asarray(values, jnp.float32), jnp.asarray(given)
  cotangent = np.array([1.0, 2.0, 3.0, 5.0, 7.0])
  slope = jax.grad(lambda v: jnp.vdot(masses.centre(v, given), cotangent))(values)
  # Centring is the projection 1 - 1 mass^T on the present points.
  kept = cotangent * (mass > 0)
  np.testing.assert_allclose(slope, kept - mass * kept.sum(), atol=1e-5)
  assert jnp.isfinite(masses.centre(values, given)).all()


def test_mean_of_no_points_is_zero():
  mean = masses.mean(jnp.ones(3), jnp.zeros(3, bool))
  np.testing.assert_array_equal(mean, [0.0])
