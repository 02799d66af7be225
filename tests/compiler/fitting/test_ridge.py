import itertools

import numpy as np
import pytest

from asap_jax.compiler.fitting.ridge import add_batch, empty_statistics, solve_ridge

BATCH, HEADS, N, SIZE = 12, 2, 9, 5


def problem(seed=0, size=SIZE, noise=0.3):
  """Centred float32 features of very different sizes, a target, and a mask."""
  random = np.random.default_rng(seed)
  mask = random.random((BATCH, 1, N)) < 0.7
  mask[..., :2] = True
  features = random.normal(size=(BATCH, HEADS, N, size)) * 10.0 ** (np.arange(size) - 2)
  weights = random.normal(size=(HEADS, size)) / 10.0 ** (np.arange(size) - 2)
  target = np.einsum("bhnf,hf->bhn", features, weights)
  target += noise * random.normal(size=target.shape)
  return *(centred(x, mask) for x in (features, target)), mask


def centred(values, mask):
  mask = mask.reshape(mask.shape + (1,) * (values.ndim - 3))
  mean = (values * mask).sum(2, keepdims=True) / mask.sum(2, keepdims=True)
  return ((values - mean) * mask).astype(np.float32)


def fit(features, target, mask=None, ridge=1e-6, cuts=()):
  """Fits in batches that end at the cuts."""
  statistics = empty_statistics(HEADS, features.shape[-1])
  edges = [0, *cuts, len(features)]
  for start, stop in itertools.pairwise(edges):
    part = slice(start, stop)
    statistics = add_batch(
      statistics, features[part], target[part], None if mask is None else mask[part]
    )
  return solve_ridge(statistics, ridge)


def rows(values, mask, head):
  """Valid tokens of a head, float64."""
  keep = np.broadcast_to(mask[:, 0], values[:, head].shape[:2])
  return values[:, head][keep].astype(np.float64)


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 1.0])
def test_weights_against_least_squares(ridge):
  features, target, mask = problem()
  actual = fit(features, target, mask, ridge)
  assert actual.dtype == np.float32
  for head in range(HEADS):
    F, t = rows(features, mask, head), rows(target, mask, head)
    # The penalty as more rows: |D w|^2 with D the standard deviations.
    penalty = np.diag(np.sqrt(ridge * (F**2).mean(0)))
    stacked = np.vstack([F / len(F) ** 0.5, penalty])
    right = np.concatenate([t / len(F) ** 0.5, np.zeros(SIZE)])
    expected = np.linalg.lstsq(stacked, right, rcond=None)[0]
    np.testing.assert_allclose(actual[head], expected, rtol=1e-5)


@pytest.mark.parametrize("cuts", [(6,), (1, 2, 11), tuple(range(1, BATCH))])
def test_batches_of_any_size_and_order_give_the_same_weights(cuts):
  features, target, mask = problem()
  expected = fit(features, target, mask)
  actual = fit(features, target, mask, cuts=cuts)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)
  order = np.random.default_rng(1).permutation(BATCH)
  actual = fit(features[order], target[order], mask[order], cuts=cuts)
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("cuts", [(), (1, 5, 6)])
def test_nearly_collinear_features_predict_like_float64(cuts):
  # The target lies in the small difference of two columns: sums in float32 lose it.
  random = np.random.default_rng(2)
  mask = np.ones((BATCH, 1, N), bool)
  base = random.normal(size=(BATCH, HEADS, N))
  difference = random.normal(size=base.shape)
  features = centred(np.stack([base, base * (1 + 1e-4) + 1e-4 * difference], -1), mask)
  target = centred(difference + 0.1 * random.normal(size=base.shape), mask)
  actual = fit(features, target, mask, 1e-12, cuts)
  whole = fit(features, target, mask, 1e-12)
  for head in range(HEADS):
    F, t = rows(features, mask, head), rows(target, mask, head)
    expected = np.linalg.lstsq(F, t, rcond=None)[0]
    assert np.abs(expected).max() > 1e3
    # Weights of 1e4 are themselves rounded to float32.
    prediction = F @ actual[head].astype(np.float64)
    np.testing.assert_allclose(prediction, F @ expected, atol=1e-2)
    prediction -= F @ whole[head].astype(np.float64)
    np.testing.assert_allclose(prediction, 0, atol=1e-2)
    r2 = 1 - ((t - F @ expected) ** 2).sum() / (t**2).sum()
    assert r2 > 0.9


def test_feature_without_variance_gets_no_weight():
  features, target, mask = problem()
  expected = fit(features, target, mask)
  features = np.insert(features, 2, 0.0, axis=-1)
  actual = fit(features, target, mask)
  np.testing.assert_array_equal(actual[:, 2], 0)
  kept = np.delete(actual, 2, axis=-1)
  np.testing.assert_allclose(kept, expected, rtol=1e-5)


def test_target_without_variance_gets_no_weights():
  features, target, mask = problem()
  actual = fit(features, np.zeros_like(target), mask)
  np.testing.assert_array_equal(actual, 0)


def test_statistics_keep_their_size_and_the_given_ones_stay():
  features, target, mask = problem()
  empty = empty_statistics(HEADS, SIZE)
  one = add_batch(empty, features, target, mask)
  two = add_batch(one, features, target)
  assert [s.shape for s in two] == [s.shape for s in empty]
  assert not any(s.any() for s in empty)
  np.testing.assert_array_equal(one.count, np.full(HEADS, mask.sum()))
  np.testing.assert_array_equal(two.count - one.count, np.full(HEADS, BATCH * N))
  for a, b in zip(one[:2], two[:2], strict=True):
    assert a.dtype == np.float64
    np.testing.assert_allclose(b, 2 * a)


def test_masks_per_head_are_counted_per_head():
  features, target, _ = problem()
  mask = np.zeros((BATCH, HEADS, N), bool)
  mask[:, 0] = True
  mask[:, 1, :3] = True
  statistics = add_batch(empty_statistics(HEADS, SIZE), features, target, mask)
  np.testing.assert_array_equal(statistics.count, [BATCH * N, BATCH * 3])


def test_too_few_valid_tokens_are_refused():
  features, target, mask = problem()
  mask = np.zeros_like(mask)
  mask[0, 0, : SIZE - 1] = True
  with pytest.raises(ValueError, match=r"4 tokens for 5 features"):
    fit(features * mask[..., None], target * mask, mask)
  with pytest.raises(ValueError, match=r"0 tokens"):
    solve_ridge(empty_statistics(HEADS, SIZE))


@pytest.mark.parametrize("ridge", [0.0, -1.0, np.nan])
def test_ridge_that_is_not_positive_is_refused(ridge):
  features, target, _ = problem()
  with pytest.raises(ValueError, match=r"ridge=.*positive"):
    fit(features, target, ridge=ridge)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["features", "target"])
def test_values_that_are_not_finite_are_refused(which, value):
  given = dict(zip(("features", "target"), problem()[:2], strict=True))
  given[which][3, 1, 2] = value
  with pytest.raises(ValueError, match=f"{which}: . of .* not finite"):
    fit(**given)


@pytest.mark.parametrize(
  ("features", "target", "message"),
  [
    ((3, HEADS, N), (3, HEADS, N), "features has shape"),
    ((3, HEADS + 1, N, SIZE), (3, HEADS + 1, N), "features has shape"),
    ((3, HEADS, N, SIZE + 1), (3, HEADS, N), "features has shape"),
    ((3, HEADS, N, SIZE), (3, N, HEADS), "target has shape"),
  ],
)
def test_shapes_that_do_not_fit_are_refused(features, target, message):
  with pytest.raises(ValueError, match=f"{message}.*expected"):
    add_batch(empty_statistics(HEADS, SIZE), np.zeros(features), np.zeros(target))


def test_mask_that_does_not_fit_is_refused():
  features, target, _ = problem()
  with pytest.raises(ValueError, match=r"broadcast"):
    add_batch(
      empty_statistics(HEADS, SIZE), features, target, np.ones((BATCH, 1, N + 1), bool)
    )
