"""The network of a dual map, against its formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax.dual_map.features import Features
from asap_jax.dual_map.network import apply_network, init_network

BATCH, HEADS, N, M, DIM, FEATURES, HIDDEN = 2, 3, 7, 5, 4, 6, 8
RANDOM = np.random.default_rng(0)
QUERY_MASK = jnp.arange(N) < jnp.array([[[7]], [[4]]])
KEY_MASK = jnp.arange(M) < jnp.array([[[3]], [[5]]])


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY, KEY = normal(BATCH, HEADS, N, DIM), normal(BATCH, HEADS, M, DIM)
RAW = normal(BATCH, HEADS, N, FEATURES)
NETWORK = jax.tree.map(
  lambda leaf: normal(*leaf.shape),
  init_network(jax.random.key(0), HEADS, DIM, FEATURES, HIDDEN),
)


def centred(masked):
  """Features centred over the valid queries, zero at the others."""
  mask = QUERY_MASK if masked else jnp.ones_like(QUERY_MASK)
  mask = mask[..., None]
  mean = (RAW * mask).sum(-2, keepdims=True) / mask.sum(-2, keepdims=True)
  return (RAW - mean) * mask


def features_of(columns, mask=None):
  """The columns, one of which comes alone."""
  return Features((columns[..., :1], columns[..., 1:]), mask)


def reference(features, query, key, query_mask, key_mask):
  """One sequence and all heads, in float64, token by token."""
  arrays = {name: np.float64(leaf) for name, leaf in vars(NETWORK).items()}
  out = np.zeros(query.shape[:2])
  relu = lambda x: np.maximum(x, 0)  # noqa: E731
  for head in range(HEADS):
    at = {name: leaf[head] for name, leaf in arrays.items()}
    q, k, x = (np.float64(a[head]) for a in (query, key, features))
    q, k, x = q[query_mask], k[key_mask], x[query_mask]
    context = [
      relu(q @ at["query_kernel"] + at["query_bias"]).mean(0),
      relu(k @ at["key_kernel"] + at["key_bias"]).mean(0),
      np.sqrt((x**2).mean(0)),
    ]
    shifted = np.concatenate(context) - at["context_shift"]
    hidden = (
      x @ at["feature_kernel"] + shifted @ at["context_kernel"] + at["hidden_bias"]
    )
    added = relu(hidden) @ at["output"]
    out[head, query_mask] = added - added.mean()
  return out


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_formula(masked):
  masks = (QUERY_MASK, KEY_MASK) if masked else (None, None)
  features = features_of(RAW, masks[0])
  found = apply_network(NETWORK, features, QUERY, KEY, masks[1])
  full = np.ones((BATCH, N), bool), np.ones((BATCH, M), bool)
  given = [np.asarray(mask)[:, 0] for mask in masks] if masked else full
  for b in range(BATCH):
    expected = reference(centred(masked)[b], QUERY[b], KEY[b], given[0][b], given[1][b])
    np.testing.assert_allclose(found[b], expected, rtol=1e-3, atol=1e-4)


def test_what_lies_at_padding_reaches_neither_value_nor_gradient():
  def total(network, query, key):
    features = features_of(centred(True), QUERY_MASK)
    out = apply_network(network, features, query, key, KEY_MASK)
    return jnp.sum(out**2)

  spoilt = (
    jnp.where(QUERY_MASK[..., None], QUERY, jnp.nan),
    jnp.where(KEY_MASK[..., None], KEY, jnp.nan),
  )
  found, expected = (
    jax.value_and_grad(total)(NETWORK, *given) for given in (spoilt, (QUERY, KEY))
  )
  for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(one, two)


def test_permutation():
  columns = centred(False)
  expected = apply_network(NETWORK, features_of(columns), QUERY, KEY)
  queries, keys = RANDOM.permutation(N), RANDOM.permutation(M)
  moved = features_of(columns[:, :, queries])
  found = apply_network(NETWORK, moved, QUERY[:, :, queries], KEY[:, :, keys])
  np.testing.assert_allclose(found, expected[..., queries], rtol=1e-4, atol=1e-4)


def test_jit_and_vmap_change_nothing():
  apply = lambda network, columns, *tokens: apply_network(  # noqa: E731
    network, features_of(columns), *tokens
  )
  columns = centred(False)
  expected = apply(NETWORK, columns, QUERY, KEY)
  jitted = jax.jit(apply)(NETWORK, columns, QUERY, KEY)
  np.testing.assert_allclose(jitted, expected, rtol=1e-4, atol=1e-4)
  mapped = jax.vmap(apply, (None, 0, 0, 0))(NETWORK, columns, QUERY, KEY)
  np.testing.assert_allclose(mapped, expected, rtol=1e-4, atol=1e-4)


def test_gradient_against_finite_differences():
  features = features_of(centred(False))

  def total(network):
    return jnp.sum(jnp.sin(apply_network(network, features, QUERY, KEY)))

  gradient = jax.grad(total)(NETWORK)
  for name in ("query_kernel", "key_bias", "context_kernel", "output"):
    direction = normal(*getattr(NETWORK, name).shape)

    def along(step, name=name, direction=direction):
      moved = vars(NETWORK) | {name: getattr(NETWORK, name) + step * direction}
      return float(total(type(NETWORK)(**moved)))

    expected = (along(1e-3) - along(-1e-3)) / 2e-3
    found = float(jnp.sum(getattr(gradient, name) * direction))
    assert found == pytest.approx(expected, rel=5e-2, abs=0.1), name
  assert np.abs(gradient.context_shift).max() == 0.0


@pytest.mark.parametrize("hidden", [0, 1])
def test_too_few_units_are_refused(hidden):
  with pytest.raises(ValueError, match=f"hidden={hidden}"):
    init_network(jax.random.key(0), HEADS, DIM, FEATURES, hidden)
