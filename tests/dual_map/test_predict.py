import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles, references

from asap_jax.dual_map import features
from asap_jax.dual_map import predict as dual_map
from asap_jax.dual_map.features import FEATURES, KINDS, feature_count
from asap_jax.dual_map.network import init_network
from asap_jax.dual_map.predict import DualMap, linear_dual
from asap_jax.masses import centre

# Compiled: a single eager call of each operation takes longer than all of them.
dual_features = jax.jit(features.dual_features, static_argnames="features")
predict_dual = jax.jit(dual_map.predict_dual)

BATCH, HEADS, N, M, DIM, SLICES = 2, 2, oracles.N, oracles.M, 3, 4
COLUMNS = {"potentials": SLICES, "query": DIM, "cumulants": 2}
RANDOM = np.random.default_rng(0)
QUERY = jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, N, DIM)), jnp.float32)
KEY = jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, M, DIM)) + 0.5, jnp.float32)
# Not of unit length: they are normalised where they are used.
DIRECTIONS = jnp.asarray(RANDOM.normal(size=(HEADS, SLICES, DIM)), jnp.float32)
WEIGHTS = jnp.asarray(
  RANDOM.normal(size=(HEADS, sum(COLUMNS.values()))) / 2, jnp.float32
)
DUAL_MAP = DualMap(DIRECTIONS, WEIGHTS)
MASKS = oracles.QUERY_MASK, oracles.KEY_MASK


def on_device(weights):
  return [w if w is None else jnp.asarray(w) for w in weights]


def expected_features(query, key, directions, weights, kinds=FEATURES):
  def of(b, h):
    return references.dual_features(
      query[b, h], key[b, h], directions[h], *weights, kinds
    )

  return np.array([[of(b, h) for h in range(HEADS)] for b in range(BATCH)])


def centred_logs(weights, size):
  """What a dual holds of masses: their logarithms, less their mean."""
  mass = np.float64(oracles.masses(weights, size))
  logs = np.log(np.where(mass > 0, mass, 1.0))
  return np.where(mass > 0, logs - (mass * logs).sum(-1, keepdims=True), 0.0)


@pytest.mark.parametrize("name", oracles.WEIGHTS)
def test_features_and_prediction_against_numpy(name):
  weights = oracles.WEIGHTS[name]
  given = on_device(weights)
  expected = expected_features(QUERY, KEY, DIRECTIONS, weights)
  actual = dual_features(QUERY, KEY, DIRECTIONS, FEATURES, *given)
  np.testing.assert_allclose(actual, expected, atol=3e-5)
  prediction = predict_dual(DUAL_MAP, QUERY, KEY, *given)
  expected = np.einsum("bhnp,hp->bhn", expected, np.float64(WEIGHTS))
  expected += centred_logs(weights[0], N)
  np.testing.assert_allclose(prediction, expected, atol=5e-5)
  if weights[0] is not None:
    absent = np.asarray(weights[0]) == 0
    assert not np.asarray(actual)[..., absent, :].any()
    assert not np.asarray(prediction)[..., absent].any()


@pytest.mark.parametrize(
  "kinds", [("potentials",), ("query", "cumulants"), ("potentials", "cumulants")]
)
def test_kinds_of_features_are_columns_of_all(kinds):
  keep = np.concatenate(
    [np.full(size, kind in kinds) for kind, size in COLUMNS.items()]
  )
  assert feature_count(kinds, SLICES, DIM) == keep.sum()
  masks = on_device(MASKS)
  everything = np.asarray(dual_features(QUERY, KEY, DIRECTIONS, FEATURES, *masks))
  some = dual_features(QUERY, KEY, DIRECTIONS, kinds, *masks)
  np.testing.assert_allclose(some, everything[..., keep], atol=1e-6)
  some = DualMap(DIRECTIONS, WEIGHTS[:, keep], kinds)
  expected = np.einsum("bhnp,hp->bhn", everything[..., keep], WEIGHTS[:, keep])
  actual = predict_dual(some, QUERY, KEY, *masks)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["equal", "masks", "masses with zeros"])
@pytest.mark.parametrize("kind", ["gaussian_diagonal", "gaussian"])
def test_gaussian_features_against_numpy(kind, name):
  weights = oracles.WEIGHTS[name]
  # Coordinates of unlike spreads and means, which features must not see.
  spread = np.array([3.0, 1.0, 0.2])
  query, key = (QUERY + 2.0) * spread, KEY * spread - 1.0
  expected = expected_features(query, key, DIRECTIONS, weights, (kind,))
  given = on_device(weights)
  actual = dual_features(query, key, DIRECTIONS, (kind,), *given)
  assert actual.shape[-1] == feature_count((kind,), SLICES, DIM)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  padded = [
    points if w is None else jnp.where((w > 0)[:, None], points, jnp.nan)
    for points, w in zip((query, key), given, strict=True)
  ]
  clean = dual_features(*padded, DIRECTIONS, (kind,), *given)
  np.testing.assert_array_equal(clean, actual)


def key_side(**options):
  """A map of the key side with features of every kind that has a reference."""
  kinds = (*FEATURES, "gaussian_diagonal", "gaussian")
  size = feature_count(kinds, SLICES, DIM)
  weights = np.random.default_rng(1).normal(size=(HEADS, size)) / 3
  return DualMap(
    DIRECTIONS, jnp.asarray(weights, jnp.float32), kinds, side="key", **options
  )


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("equal", marks=pytest.mark.slow),
    "masks",
    pytest.param("masses with zeros", marks=pytest.mark.slow),
  ],
)
def test_from_the_key_side_queries_and_keys_change_places(name):
  weights, held = oracles.WEIGHTS[name], key_side()
  actual = predict_dual(held, QUERY, KEY, *on_device(weights))
  assert actual.shape == (BATCH, HEADS, M)
  for b, h in np.ndindex(BATCH, HEADS):
    tokens = KEY[b, h], QUERY[b, h]
    columns = references.dual_features(
      *tokens, DIRECTIONS[h], *weights[::-1], held.features
    )
    expected = columns @ np.float64(held.weights[h]) + centred_logs(weights[1], M)
    np.testing.assert_allclose(actual[b, h], expected, atol=2e-4)
  if weights[1] is not None:
    np.testing.assert_array_equal(actual[..., weights[1] == 0], 0)
  swapped = dataclasses.replace(held, side="query")
  # Operation by operation: XLA may round two programs differently.
  with jax.disable_jit():
    actual = predict_dual(held, QUERY, KEY, *on_device(weights))
    swapped = predict_dual(swapped, KEY, QUERY, *on_device(weights[::-1]))
  np.testing.assert_array_equal(actual, swapped)


@pytest.mark.slow
def test_a_network_of_the_key_side_sees_keys_as_its_tokens():
  network = init_network(jax.random.key(0), HEADS, DIM, WEIGHTS.shape[-1], 4)
  network = dataclasses.replace(network, output=jnp.ones((HEADS, 4)))
  held = dataclasses.replace(DUAL_MAP, network=network)
  masks = on_device(MASKS)
  expected = predict_dual(held, KEY, QUERY, *masks[::-1])
  keyed = dataclasses.replace(held, side="key")
  actual = predict_dual(keyed, QUERY, KEY, *masks)
  np.testing.assert_array_equal(actual, expected)
  linear = predict_dual(dataclasses.replace(keyed, network=None), QUERY, KEY, *masks)
  assert np.abs(actual - linear).max() > 0.1


def test_vmap_of_a_key_side_map_agrees_with_the_batch():
  held, masks = key_side(), on_device(MASKS)
  mapped = jax.jit(jax.vmap(predict_dual, in_axes=(None, 0, 0, None, None)))
  expected = predict_dual(held, QUERY, KEY, *masks)
  np.testing.assert_allclose(mapped(held, QUERY, KEY, *masks), expected, atol=1e-4)


def test_closures_of_a_map_are_plain_until_they_are_learned():
  assert DUAL_MAP.closures == 1
  one, two, three = (DUAL_MAP.with_closures(count) for count in (1, 2, 3))
  assert [held.closures for held in (one, two, three)] == [1, 2, 3]
  assert one.steps == {"relaxation": None, "momentum": None, "side": "query"}
  assert two.momentum is None
  np.testing.assert_array_equal(two.relaxation, np.ones((HEADS, 1)))
  np.testing.assert_array_equal(three.relaxation, np.ones((HEADS, 2)))
  np.testing.assert_array_equal(three.momentum, np.zeros((HEADS, 2)))
  assert three.with_closures(1).to_named().keys() == {"directions", "weights"}
  half = key_side(half=True)
  assert half.closures == 0
  # Whole closures follow a map that half of one did.
  assert half.with_closures(2).closures == 2
  assert half.with_closures(2).side == "key"


@pytest.mark.parametrize(
  "options", [{}, {"side": "key"}, {"side": "key", "half": True}]
)
def test_named_leaves_give_the_map_back(options):
  held = dataclasses.replace(DUAL_MAP, **options)
  if not options.get("half"):
    held = held.with_closures(3)
  back = DualMap.from_named(held.to_named(), held.features, **options)
  assert jax.tree.structure(back) == jax.tree.structure(held)
  jax.tree.map(np.testing.assert_array_equal, back, held)


@pytest.mark.parametrize("garbage", [np.nan, 1e6])
def test_appended_padding_changes_nothing(garbage):
  expected = predict_dual(DUAL_MAP, QUERY, KEY)
  pad = ((0, 0), (0, 0), (0, 3), (0, 0))
  query, key = (jnp.pad(x, pad, constant_values=garbage) for x in (QUERY, KEY))
  masks = jnp.arange(N + 3) < N, jnp.arange(M + 3) < M
  actual = predict_dual(DUAL_MAP, query, key, *masks)
  np.testing.assert_allclose(actual[..., :N], expected, atol=2e-5)
  np.testing.assert_array_equal(actual[..., N:], 0)


def test_masks_may_differ_between_heads_and_elements():
  queries = jnp.asarray(RANDOM.random((BATCH, HEADS, N)) < 0.7).at[..., 0].set(True)
  keys = jnp.asarray(RANDOM.random((BATCH, 1, M)) < 0.7).at[..., 0].set(True)
  actual = predict_dual(DUAL_MAP, QUERY, KEY, queries, keys)
  for b, h in np.ndindex(BATCH, HEADS):
    columns = references.dual_features(
      QUERY[b, h], KEY[b, h], DIRECTIONS[h], queries[b, h], keys[b, 0]
    )
    expected = columns @ np.float64(WEIGHTS[h])
    np.testing.assert_allclose(actual[b, h], expected, atol=5e-5)


def test_permuting_tokens_permutes_the_dual():
  masks = on_device(MASKS)
  expected = predict_dual(DUAL_MAP, QUERY, KEY, *masks)
  rows, columns = RANDOM.permutation(N), RANDOM.permutation(M)
  actual = predict_dual(
    DUAL_MAP,
    QUERY[..., rows, :],
    KEY[..., columns, :],
    masks[0][rows],
    masks[1][columns],
  )
  np.testing.assert_allclose(actual, expected[..., rows], atol=2e-5)


@pytest.mark.parametrize("weights", [(None, None), MASKS], ids=["all", "masks"])
def test_gradients_against_finite_differences(weights):
  cotangent = RANDOM.normal(size=(BATCH, HEADS, N))
  point = {"weights": WEIGHTS, "directions": DIRECTIONS, "query": QUERY, "key": KEY}
  given = on_device(weights)

  @jax.jit
  @jax.grad
  def slopes(at):
    tokens = at["query"], at["key"]
    f = predict_dual(DualMap(at["directions"], at["weights"]), *tokens, *given)
    return jnp.vdot(f, jnp.asarray(cotangent, jnp.float32))

  def moved(leaf, shift):
    at = point | {leaf: np.float64(point[leaf]) + shift}
    columns = expected_features(at["query"], at["key"], at["directions"], weights)
    return np.vdot(np.einsum("bhnp,hp->bhn", columns, at["weights"]), cotangent)

  # Along a few directions: the oracle is slow. Steps are so small that no two
  # projections swap their order.
  for leaf, slope in slopes(point).items():
    for _ in range(4):
      shift = RANDOM.normal(size=slope.shape)
      expected = (moved(leaf, 1e-6 * shift) - moved(leaf, -1e-6 * shift)) / 2e-6
      np.testing.assert_allclose(
        np.vdot(slope, shift), expected, rtol=1e-3, atol=1e-3, err_msg=leaf
      )


def test_null_direction_gives_null_potentials_and_finite_gradients():
  null = DIRECTIONS.at[:, 1].set(0)
  potentials = dual_features(QUERY, KEY, null)[..., 1]
  np.testing.assert_array_equal(potentials, 0)
  slope = jax.grad(
    lambda d: predict_dual(DualMap(d, WEIGHTS), QUERY, KEY)[..., 0].sum()
  )
  assert jnp.isfinite(slope(null)).all()


@pytest.mark.slow
def test_jit_and_vmap_agree_with_eager_calls():
  masks = on_device(MASKS)
  with jax.disable_jit():
    eager = dual_map.predict_dual(DUAL_MAP, QUERY, KEY, *masks)
  actual = predict_dual(DUAL_MAP, QUERY, KEY, *masks)
  np.testing.assert_allclose(actual, eager, atol=1e-5)
  mapped = jax.vmap(predict_dual, in_axes=(None, 0, 0, None, None))
  np.testing.assert_allclose(mapped(DUAL_MAP, QUERY, KEY, *masks), eager, atol=1e-5)
  maps = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), DUAL_MAP)
  over_maps = jax.vmap(predict_dual, in_axes=(0, None, None))(maps, QUERY, KEY)
  double = DualMap(2 * DIRECTIONS, 2 * WEIGHTS)
  np.testing.assert_allclose(over_maps[1], predict_dual(double, QUERY, KEY), atol=1e-5)


def test_half_precision_inputs_are_computed_in_float32():
  query, key = QUERY.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16)
  actual = predict_dual(DUAL_MAP, query, key)
  assert actual.dtype == jnp.float32
  assert dual_features(query, key, DIRECTIONS).dtype == jnp.float32
  exact = predict_dual(DUAL_MAP, query.astype(jnp.float32), key.astype(jnp.float32))
  np.testing.assert_allclose(actual, exact, atol=1e-6)


def test_dual_map_is_a_pytree_of_two_arrays():
  leaves, structure = jax.tree.flatten(DUAL_MAP)
  assert [leaf.shape for leaf in leaves] == [DIRECTIONS.shape, WEIGHTS.shape]
  some = dataclasses.replace(DUAL_MAP, features=("query",))
  assert jax.tree.structure(some) != structure


@pytest.mark.parametrize(
  "kinds", [(), ("sorted",), ("query", "query"), ("cumulants", "query")]
)
def test_kinds_that_are_not_understood_are_refused(kinds):
  with pytest.raises(ValueError, match=r"expected some of"):
    dual_features(QUERY, KEY, DIRECTIONS, kinds)
  with pytest.raises(ValueError, match=r"expected some of"):
    feature_count(kinds, SLICES, DIM)


@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"dual_map.weights has shape .* expected 9"):
    predict_dual(DualMap(DIRECTIONS, WEIGHTS[:, 1:]), QUERY, KEY)
  with pytest.raises(ValueError, match=r"query_weights has shape"):
    predict_dual(DUAL_MAP, QUERY, KEY, jnp.ones(N + 1, bool))
  with pytest.raises(ValueError, match=r"key_weights has dtype"):
    dual_features(QUERY, KEY, DIRECTIONS, FEATURES, None, jnp.ones(M, jnp.int32))


def test_transport_is_where_sorted_points_meet():
  key = jax.random.normal(jax.random.key(7), QUERY.shape)
  columns = dual_features(QUERY, key, DIRECTIONS, ("transport",))
  directions = np.asarray(DIRECTIONS)
  directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
  slices = directions.shape[1]
  for b, h, l in np.ndindex(*QUERY.shape[:2], slices):
    x, y = (np.asarray(points)[b, h] @ directions[h, l] for points in (QUERY, key))
    sent = np.empty_like(x)
    sent[np.argsort(x)] = np.sort(y)
    for column, expected in ((l, sent), (slices + l, sent * x)):
      found = columns[b, h, :, column]
      np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [KINDS, KINDS[1:3], KINDS[2:], ("query",)], ids=str)
@pytest.mark.parametrize("weights", [(None, None), MASKS], ids=["whole", "masked"])
def test_features_in_parts_are_the_columns(kinds, weights):
  given = on_device(weights)
  width = feature_count(kinds, SLICES, DIM)
  kernel = jnp.asarray(RANDOM.normal(size=(HEADS, width, 3)), jnp.float32)

  @jax.jit
  def parts(kernel):
    found = features.features_of(QUERY, KEY, DIRECTIONS, kinds, *given)
    return centre(found.times(kernel), given[0], axis=-2), found.variances()

  times, variances = parts(kernel)
  columns = np.float64(dual_features(QUERY, KEY, DIRECTIONS, kinds, *given))
  expected = np.einsum("bhnp,hpw->bhnw", columns, kernel)
  np.testing.assert_allclose(times, expected, atol=1e-4)
  mass = np.float64(oracles.masses(weights[0], N))
  expected = (columns**2 * mass[:, None]).sum(-2)
  np.testing.assert_allclose(variances, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [(None, None), MASKS], ids=["whole", "masked"])
@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.slow), 30.0])
def test_cumulants_of_products_are_those_of_queries_and_keys(weights, offset):
  given = on_device(weights)
  key = KEY + offset
  products = jnp.einsum("bhnd,bhmd->bhnm", QUERY, key)
  expected = predict_dual(DUAL_MAP, QUERY, key, *given)
  # Not centred: the two differ by a constant a sequence.
  found = centre(linear_dual(DUAL_MAP, QUERY, key, *given, products), given[0])
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * (1 + offset))


@pytest.mark.slow
def test_cumulants_of_products_from_the_key_side():
  held, given = key_side(), on_device(MASKS)
  products = jnp.einsum("bhnd,bhmd->bhnm", QUERY, KEY)
  expected = predict_dual(held, QUERY, KEY, *given)
  found = centre(linear_dual(held, QUERY, KEY, *given, products), given[1])
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
