"""Attention whose dual map learns in the loop: values, its loss, and what learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import asap_jax
from asap_jax import (
  AmortizedAttention,
  AmortizedMultiHeadAttention,
  DualParam,
  SinkhornMultiHeadAttention,
  dual_loss,
  sinkhorn_attention,
)
from asap_jax.attention.amortized import DualLoss
from asap_jax.metrics import column_error

BATCH, N, M, HEADS, DIM, WIDTH = 2, 6, 9, 2, 4, 8
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE = (
  jnp.asarray(1.5 * RANDOM.normal(size=(BATCH, size, HEADS, DIM)), jnp.float32)
  for size in (N, M, M)
)
X = jnp.asarray(RANDOM.normal(size=(BATCH, N, WIDTH)), jnp.float32)
VALID = jnp.arange(N) < jnp.asarray([[N], [4]])


def moved(attention, seed=1):
  """With other weights than those of the start."""
  weights = attention.parameters["weights"]
  noise = 0.3 * jax.random.normal(jax.random.key(seed), weights[...].shape)
  weights[...] = weights[...] + noise
  return attention


def objective(attention, query, key):
  """Minus the dual objective for each query, in float64, without this package."""
  weights = np.float64(attention.parameters["weights"][...])
  query, key = (
    np.float64(x).transpose(0, 2, 1, 3) * s for x, s in ((query, DIM**-0.5), (key, 1.0))
  )
  # The weights of queries and of the first cumulant; the rest is not moved here.
  mean = key.mean(-2, keepdims=True)
  assert not weights[:, DIM + 1 :].any()
  linear = weights[:, None, :DIM] + weights[:, None, DIM, None] * mean
  f = (query * linear).sum(-1)
  f -= f.mean(-1, keepdims=True)
  scores = query @ key.swapaxes(-1, -2) + f[..., None]
  largest = scores.max(-2, keepdims=True)
  g = np.log(N / M) - largest[..., 0, :] - np.log(np.exp(scores - largest).sum(-2))
  return -(f.sum(-1) + N / M * g.sum(-1)).mean() / N


def loss_of(attention, query=QUERY, key=KEY, **options):
  attention(query, key, VALUE, **options)
  return dual_loss(attention)


@pytest.mark.parametrize("trains", [True, False])
def test_begins_at_the_gaussian_start(trains):
  attention = AmortizedAttention(HEADS, DIM)
  if not trains:
    attention.eval()
  expected = sinkhorn_attention(QUERY, KEY, VALUE, iterations=1, start="gaussian")
  np.testing.assert_allclose(attention(QUERY, KEY, VALUE), expected, atol=1e-5)


def test_training_and_evaluation_are_one_function():
  attention = moved(AmortizedAttention(HEADS, DIM, {"scale": 0.7}))
  trained = attention(QUERY, KEY, VALUE)
  attention.eval()
  np.testing.assert_allclose(attention(QUERY, KEY, VALUE), trained, atol=1e-5)


def test_loss_and_its_gradient_against_float64():
  attention = AmortizedAttention(HEADS, DIM)
  weights = attention.parameters["weights"]
  weights[...] = weights[...].at[:, DIM + 1 :].set(0.0).at[:, :DIM].set(0.4)
  assert float(loss_of(attention)) == pytest.approx(
    objective(attention, QUERY, KEY), rel=1e-5
  )
  found = nnx.grad(loss_of)(attention)["parameters"]["weights"][...]
  base, step = weights[...], 1e-3
  for index in ((0, 0), (1, 2), (0, DIM)):
    values = []
    for sign in (1, -1):
      weights[...] = base.at[index].add(sign * step)
      values.append(objective(attention, QUERY, KEY))
    expected = (values[0] - values[1]) / (2 * step)
    assert float(found[index]) == pytest.approx(expected, rel=2e-2, abs=1e-4)


def test_each_loss_moves_its_own():
  attention = moved(AmortizedAttention(HEADS, DIM))

  def task(attention, query):
    return (attention(query, KEY, VALUE) ** 2).sum()

  of_map, of_query = nnx.jit(nnx.grad(task, argnums=(0, 1)))(attention, QUERY)
  assert not any(leaf.any() for leaf in jax.tree.leaves(of_map))
  assert np.abs(of_query).max() > 1e-2
  of_map, of_query = nnx.jit(nnx.grad(loss_of, argnums=(0, 1)))(attention, QUERY)
  assert np.abs(of_map["parameters"]["weights"][...]).max() > 1e-3
  assert not of_query.any()


@pytest.mark.slow
def test_gradient_of_the_task_goes_through_the_prediction():
  graph, state = nnx.split(moved(AmortizedAttention(HEADS, DIM)))
  cotangent = jnp.asarray(RANDOM.normal(size=VALUE[:, :N].shape), jnp.float32)

  def task(query):
    return (nnx.merge(graph, state, copy=True)(query, KEY, VALUE) * cotangent).sum()

  gradient = jax.grad(task)(QUERY)
  direction = jnp.asarray(RANDOM.normal(size=QUERY.shape), jnp.float32)
  ends = [float(task(QUERY + sign * 1e-2 * direction)) for sign in (1, -1)]
  slope = float((gradient * direction).sum())
  assert slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)


@pytest.mark.slow
def test_padded_equals_unpadded():
  attention = moved(AmortizedAttention(HEADS, DIM))
  rows = jnp.pad(QUERY, [(0, 0), (0, 3), (0, 0), (0, 0)], constant_values=jnp.nan)
  keys, values = (
    jnp.pad(x, [(0, 0), (0, 2), (0, 0), (0, 0)], constant_values=9.0)
    for x in (KEY, VALUE)
  )
  mask = nnx.make_attention_mask(
    jnp.broadcast_to(jnp.arange(N + 3) < N, (BATCH, N + 3)),
    jnp.broadcast_to(jnp.arange(M + 2) < M, (BATCH, M + 2)),
  )
  expected = attention(QUERY, KEY, VALUE)
  loss, gradient = nnx.value_and_grad(loss_of)(attention)
  out = attention(rows, keys, values, mask=mask)[:, :N]
  np.testing.assert_allclose(out, expected, atol=1e-5)

  def padded(attention):
    attention(rows, keys, values, mask=mask)
    return dual_loss(attention)

  of_padded, padded_gradient = nnx.value_and_grad(padded)(attention)
  assert float(of_padded) == pytest.approx(float(loss), rel=1e-5)
  for one, other in zip(
    jax.tree.leaves(padded_gradient), jax.tree.leaves(gradient), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_without_a_matrix_of_pairs_it_is_the_same():
  def run(implementation):
    attention = moved(AmortizedAttention(HEADS, DIM, None, implementation))

    def loss(attention, query):
      out = attention(query, KEY, VALUE)
      return (out**2).sum() + dual_loss(attention)

    return nnx.value_and_grad(loss, argnums=(0, 1))(attention, QUERY)

  expected, found = jax.tree.leaves(run("xla")), jax.tree.leaves(run("chunked"))
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=3e-5)


@pytest.mark.slow
def test_bfloat16_has_float32_duals():
  attention = moved(AmortizedAttention(HEADS, DIM))
  wide = attention(QUERY, KEY, VALUE)
  loss = float(dual_loss(attention))
  narrow = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
  out = attention(*narrow)
  assert out.dtype == jnp.bfloat16
  assert dual_loss(attention).dtype == jnp.float32
  assert float(dual_loss(attention)) == pytest.approx(loss, rel=2e-2)
  np.testing.assert_allclose(np.float32(out), wide, atol=0.05)


@pytest.mark.slow
def test_the_loss_makes_columns_better():
  # Sharp: the Gaussian start is far off, and there is something to learn.
  scale = {"scale": 2.0}
  attention = AmortizedAttention(HEADS, DIM, scale)

  def error(attention):
    one = jnp.broadcast_to(jnp.eye(M)[:, None], (BATCH, M, HEADS, M))
    plan = attention(QUERY, KEY, one)
    return float(column_error(jnp.moveaxis(plan, 2, 1)).mean())

  before = error(attention)
  optimizer = nnx.Optimizer(attention, optax.adam(3e-2), wrt=DualParam)

  @nnx.jit
  def step(attention, optimizer):
    loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, DualParam))(
      attention
    )
    optimizer.update(attention, gradients)
    return loss

  losses = [float(step(attention, optimizer)) for _ in range(200)]
  assert losses[-1] < losses[0]
  assert error(attention) < 0.7 * before


class Blocks(nnx.Module):
  """Layers one above the other, as the caller stacks them."""

  def __init__(self, scanned, remat, rngs):
    self.scanned, self.remat = scanned, remat

    def make(rngs):
      return AmortizedMultiHeadAttention(
        HEADS, WIDTH, dropout_rate=0.1, deterministic=False, rngs=rngs
      )

    if scanned:
      self.layers = nnx.vmap(make)(rngs.split(3))
    else:
      self.layers = nnx.List([make(rngs) for _ in range(3)])

  def __call__(self, x, mask=None):
    def one(layer, x):
      return x + layer(x, mask=mask)

    call = nnx.remat(one) if self.remat else one
    if not self.scanned:
      for layer in self.layers:
        x = call(layer, x)
      return x
    axes = nnx.StateAxes({...: 0})
    return nnx.scan(
      lambda x, layer: call(layer, x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry
    )(x, self.layers)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_works_inside_of_transformations(scanned, remat):
  model = Blocks(scanned, remat, nnx.Rngs(0, dropout=1))
  mask = nnx.make_attention_mask(VALID, VALID)

  @nnx.jit
  def run(model):
    def loss(model):
      return (model(X, mask) ** 2).mean() + dual_loss(model)

    return nnx.value_and_grad(loss)(model)

  value, gradients = run(model)
  assert np.isfinite(float(value))
  losses = jnp.concatenate(
    [jnp.ravel(loss) for loss in jax.tree.leaves(nnx.state(model, DualLoss))]
  )
  assert losses.shape == (3,)
  assert len(set(np.asarray(losses).tolist())) == 3
  of_maps = jax.tree.leaves(nnx.filter_state(gradients, DualParam))
  assert any(np.abs(leaf).max() > 0 for leaf in of_maps)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_evaluation_leaves_the_loss_alone():
  attention = moved(AmortizedAttention(HEADS, DIM))
  attention.eval()
  attention(QUERY, KEY, VALUE)
  assert float(dual_loss(attention)) == 0.0
  attention.train()
  attention(QUERY, KEY, VALUE)
  assert float(dual_loss(attention)) != 0.0


def test_saved_and_loaded_as_a_compiled_model_is(tmp_path):
  model = AmortizedMultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(0))
  moved(model.attention_fn)
  model.eval()
  expected = model(X)
  asap_jax.save(tmp_path / "model", model)
  blank = SinkhornMultiHeadAttention(HEADS, WIDTH, rngs=nnx.Rngs(3))
  loaded = asap_jax.load(tmp_path / "model", blank)
  assert isinstance(loaded.attention_fn, asap_jax.AsapAttention)
  np.testing.assert_array_equal(loaded(X), expected)


def test_what_cannot_be_is_told():
  with pytest.raises(ValueError, match="decode=True"):
    AmortizedMultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="no AmortizedAttention"):
    dual_loss(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="2 heads of dimension 4"):
    AmortizedAttention(HEADS, DIM)(*(x[..., :3] for x in (QUERY, KEY, VALUE)))


@pytest.mark.slow
def test_vmap_is_a_loop_and_jit_is_eager():
  attention = moved(AmortizedAttention(HEADS, DIM))
  graph, state = nnx.split(attention)

  @functools.partial(jax.vmap, in_axes=(None, 0, 0, 0))
  def run(state, query, key, value):
    attention = nnx.merge(graph, state, copy=True)
    return attention(query, key, value), dual_loss(attention)

  out, losses = jax.jit(run)(state, QUERY, KEY, VALUE)
  for index in range(BATCH):
    each = [x[index] for x in (QUERY, KEY, VALUE)]
    np.testing.assert_allclose(out[index], attention(*each), atol=1e-5)
    assert float(losses[index]) == pytest.approx(float(dual_loss(attention)), rel=1e-4)
