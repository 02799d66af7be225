"""`diagnose` against values computed by hand, on plans that are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

import asap_jax
from asap_jax import peers
from asap_jax.attention import softmax_attention

N = 5
PERMUTATION = np.eye(N)[[2, 0, 4, 1, 3]]
SINK = np.zeros((N, N))
SINK[:, 1] = 1.0
PLANS = {
  "identity": np.eye(N),
  "uniform": np.full((N, N), 1 / N),
  "permutation": PERMUTATION,
  "one sink": SINK,
}
# Largest column, sinks, entropy, column error; of the product by itself residual
# (composite, Frobenius), row gain, column gain, least singular value.
DEVIATION = 2 * (N - 1) / N
ROOT = np.sqrt((N - 1) / N)
EXPECTED = {
  "identity": (1 / N, (0, 0), 0.0, 0.0, (DEVIATION, ROOT), 1.0, 1.0, 1.0),
  "uniform": (1 / N, (0, 0), np.log(N), 0.0, (0.0, 0.0), 1.0, 1.0, 0.0),
  "permutation": (1 / N, (0, 0), 0.0, 0.0, (DEVIATION, ROOT), 1.0, 1.0, 1.0),
  # One column receives N times its share, N - 1 nothing.
  "one sink": (1.0, (1, 1), 0.0, 2 * (N - 1) / N, (0.0, 0.0), 1.0, N, 0.0),
}


def given(query, key, value, bias=None, mask=None, *, plan, **_):
  return jnp.einsum("nm,...mhv->...nhv", plan, value)


class Given(nnx.Module):
  """Attention of given plans, one after another."""

  def __init__(self, *plans):
    plans = [jnp.asarray(plan, jnp.float32) for plan in plans]
    self.layers = [functools.partial(given, plan=plan) for plan in plans]

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x, x, x)
    return x


def tokens(*shape):
  return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("name", PLANS)
def test_values_of_plans_that_are_known(name):
  found = asap_jax.diagnose(Given(PLANS[name]), [tokens(2, N, 3, 4)])
  (layer,), paths = found.layers, found.paths
  largest, sinks, entropy, error, residual, rows, columns, least = EXPECTED[name]
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  close(layer.largest_column, np.full(3, largest))
  close(layer.sinks, np.outer(sinks, np.ones(3)))
  close(layer.entropy, np.full(3, entropy))
  close(layer.column_error, np.full(3, error))
  close(paths.residual, np.outer(residual, np.ones(3))[:, None])
  close(paths.row_gain, np.full((1, 3), rows))
  close(paths.column_gain, np.full((1, 3), columns))
  close(paths.least_singular, np.full((1, 3), least))
  assert found.sink_share == pytest.approx(sinks)


def test_later_plans_stand_to_the_left():
  first = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.0, 0.8]])
  second = np.array([[0.0, 1.0, 0.0], [0.6, 0.0, 0.4], [1.0, 0.0, 0.0]])
  found = asap_jax.diagnose(Given(first, second), [tokens(1, 3, 1, 2)])
  product = second @ first
  rest = product - product.mean(0)
  norm = lambda x: np.sqrt(abs(x).sum(0).max() * abs(x).sum(1).max())  # noqa: E731
  expected = [norm(rest) / norm(product)]
  expected += [np.linalg.norm(rest) / np.linalg.norm(product)]
  np.testing.assert_allclose(found.paths.residual[:, 1, 0], expected, rtol=1e-5)
  np.testing.assert_allclose(
    found.paths.column_gain[:, 0], [first.sum(0).max(), product.sum(0).max()], rtol=1e-5
  )
  np.testing.assert_allclose(
    found.paths.least_singular[1, 0],
    np.linalg.svd(product, compute_uv=False)[-1],
    rtol=1e-4,
  )


def test_rank_of_outputs_and_of_states():
  x = tokens(2, N, 1, 4)
  found = asap_jax.diagnose(
    Given(np.eye(N)), [x], states=lambda model, x: [x[:, :, 0], jnp.ones((2, N, 3))]
  )
  wide = np.asarray(x[:, :, 0], np.float64)
  rest = wide - wide.mean(1, keepdims=True)
  frobenius = np.linalg.norm(rest, axis=(1, 2)) / np.linalg.norm(wide, axis=(1, 2))
  np.testing.assert_allclose(found.layers[0].residual[1], frobenius.mean(), rtol=1e-5)
  np.testing.assert_allclose(found.states[1], [frobenius.mean(), 0.0], atol=1e-6)
  np.testing.assert_allclose(found.states[0, 1], 0.0, atol=1e-6)


def test_batches_count_by_their_sequences():
  x = tokens(3, 6, 8)
  layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
  whole = asap_jax.diagnose(layer, [x])
  parts = asap_jax.diagnose(layer, [x[:2], x[2:]])
  for one, other in zip(whole.layers[0][1:], parts.layers[0][1:], strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("own", [False, True])
def test_padding_counts_for_nothing(own):
  options = {"attention_fn": softmax_attention} if own else {}
  layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), **options)
  x = tokens(2, 4, 8)
  expected = asap_jax.diagnose(layer, [x])
  padded = jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=9.0)
  valid = jnp.arange(7) < jnp.full((2, 1), 4)
  mask = nnx.make_attention_mask(valid, valid)
  found = asap_jax.diagnose(layer, [padded], call=lambda layer, x: layer(x, mask=mask))
  for one, other in zip(found.layers[0][1:], expected.layers[0][1:], strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  for one, other in zip(found.paths, expected.paths, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_all_kinds_of_attention_are_found_in_the_order_of_their_calls():
  class Mixed(nnx.Module):
    def __init__(self):
      self.z = asap_jax.softmax_attention
      self.m = models.compiled().model.blocks[0].attention.attention_fn
      self.a = functools.partial(asap_jax.sinkhorn_attention, iterations=20)
      self.p = peers.kernel_sinkhorn_attention

    def __call__(self, x):
      for attend in (self.z, self.m, self.a, self.p, self.z):
        x = attend(x, x, x)
      return x

  found = asap_jax.diagnose(Mixed(), [tokens(2, N, 2, 8)])
  names = [layer.name for layer in found.layers]
  assert names == ["z, call 1", "m", "a", "p", "z, call 2"]
  errors = {layer.name: layer.column_error.max() for layer in found.layers}
  assert errors["a"] < 1e-3 < errors["m"] < errors["z, call 1"]
  assert "column gain" in str(found).replace("\n", " ") or "gain" in str(found)
  assert found.paths.row_gain.shape == (5, 2)


def test_layers_of_other_lengths_make_no_path():
  class Two(nnx.Module):
    def __init__(self):
      self.own = asap_jax.softmax_attention

    def __call__(self, x):
      return self.own(x, x, x), self.own(x[:, :3], x, x)

  found = asap_jax.diagnose(Two(), [tokens(2, N, 2, 4)])
  assert found.paths is None
  assert len(found.layers) == 2
  with pytest.raises(ValueError, match="paths=None"):
    found.plot()


def test_padding_of_packed_sequences_counts_for_nothing():
  class Packed(nnx.Module):
    def __init__(self, **options):
      self.attend = functools.partial(softmax_attention, **options)

    def __call__(self, x):
      return self.attend(x, x, x)

  x = tokens(2, N, 2, 4)
  expected = asap_jax.diagnose(Packed(), [x])
  filled = jnp.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=9.0)
  ids = jnp.asarray((jnp.arange(N + 2) < N) * jnp.ones((2, 1)), int)

  def call(model, x):
    return model.attend(x, x, x, segment_ids=ids)

  found = asap_jax.diagnose(Packed(), [filled], call=call)
  for one, other in zip(found.layers[0][1:], expected.layers[0][1:], strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layers_of_a_scan_are_told_apart():
  class Stacked(nnx.Module):
    def __init__(self):
      @nnx.split_rngs(splits=2)
      @nnx.vmap
      def create(rngs):
        return models.Block(models.WIDTH, rngs)

      self.blocks = create(nnx.Rngs(0))

    def __call__(self, x):
      scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      return scan(lambda x, block: block(x))(x, self.blocks)

  found = asap_jax.diagnose(Stacked(), models.batches()[:1])
  assert [layer.name for layer in found.layers] == [
    "blocks.attention[0]",
    "blocks.attention[1]",
  ]
  assert found.paths.row_gain.shape == (2, models.HEADS)


def test_what_cannot_be_diagnosed():
  x = tokens(2, N, 1, 4)
  with pytest.raises(ValueError, match="no attention function"):
    asap_jax.diagnose(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [x])
  with pytest.raises(ValueError, match="batches is empty"):
    asap_jax.diagnose(Given(np.eye(N)), [])
  with pytest.raises(ValueError, match="no call of an attention"):
    asap_jax.diagnose(Given(np.eye(N)), [x], call=lambda model, x: x)


def test_paths_are_drawn():
  found = asap_jax.diagnose(Given(PERMUTATION, SINK), [tokens(1, N, 2, 4)])
  axes = found.plot()
  drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
  np.testing.assert_allclose(drawn["column gain"], [1.0, N], rtol=1e-5)
  np.testing.assert_allclose(drawn["rank residual"], [DEVIATION, np.nan], rtol=1e-5)
  least = np.nan_to_num(drawn["least singular value"])
  np.testing.assert_allclose(least, [1.0, 0.0], atol=1e-6)
