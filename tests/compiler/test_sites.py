import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models, references

from asap_jax import SinkhornMultiHeadAttention, sinkhorn_attention, softmax_attention
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.recorder import recorder
from asap_jax.compiler.sites import find_sinkhorn, replace_sites

BATCH, N, HEADS, WIDTH = 3, 6, models.HEADS, models.WIDTH
DIM = WIDTH // HEADS
X = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, N, WIDTH)), jnp.float32)


def layer(iterations, rngs=None, **options):
  return SinkhornMultiHeadAttention(
    HEADS, WIDTH, iterations=iterations, rngs=rngs or nnx.Rngs(0), **options
  )


class Zoo(nnx.Module):
  """Attention held in every way that a model may hold it."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    shared = layer(1)
    self.listed = nnx.List([layer(i, rngs) for i in range(2, 14)])
    self.sequence = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), layer(21))
    self.named = nnx.Dict(inner=layer(22, epsilon=0.5))
    self.first, self.second = shared, shared
    self.bare = sinkhorn_attention
    self.nested = functools.partial(
      functools.partial(sinkhorn_attention, epsilon=3.0, iterations=7), iterations=23
    )
    self.softmax = softmax_attention
    self.bound_softmax = functools.partial(softmax_attention, scale=1.0)
    self.flax = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)


def test_every_way_of_holding_attention_is_found():
  sites = {site.name: site for site in find_sinkhorn(Zoo())}
  # A shared layer goes by the name that it is met under first.
  assert sites.keys() - {"first", "second"} == {
    *(f"listed.{i}" for i in range(12)), "sequence.layers.1", "named.inner",
    "bare", "nested",
  }  # fmt: skip
  assert len(sites.keys() & {"first", "second"}) == 1
  iterations = {name: site.iterations for name, site in sites.items()}
  assert iterations["listed.11"] == 13
  assert iterations["sequence.layers.1"] == 21
  assert iterations["bare"] == 20
  assert iterations["nested"] == 23
  assert sites["named.inner"].options == {"epsilon": 0.5}
  assert sites["nested"].options == {"epsilon": 3.0}
  assert sites["bare"].options == {}


def test_sites_are_in_the_order_of_the_layers():
  names = [site.name for site in find_sinkhorn(Zoo())]
  listed = [name for name in names if name.startswith("listed")]
  assert listed == [f"listed.{i}" for i in range(12)]


def test_model_without_sinkhorn_attention_has_no_sites():
  flax = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=nnx.Rngs(0))
  assert find_sinkhorn(flax) == []


def test_sites_know_their_start_and_half_iterations_are_left_out():
  class Model(nnx.Module):
    def __init__(self):
      self.first = layer(2, start="gaussian", epsilon=0.5)
      self.half = layer(0, start="gaussian_diagonal")
      self.bound = functools.partial(
        sinkhorn_attention, relaxation=1.5, implementation="xla", scale=0.3
      )

  sites = {site.name: site for site in find_sinkhorn(Model())}
  assert sites.keys() == {"first", "bound"}
  assert sites["first"].teacher == Sinkhorn(2, None, "gaussian")
  assert sites["first"].options == {"epsilon": 0.5}
  assert sites["bound"].teacher == Sinkhorn(20, "xla", relaxation=1.5)
  assert sites["bound"].options == {"scale": 0.3}


def test_replacing_leaves_the_original_untouched():
  model = models.toy()
  sites = find_sinkhorn(model)
  before, expected = jax.tree.map(jnp.copy, nnx.state(model)), models.forward(model, X)
  copy = replace_sites(model, sites, [softmax_attention, sites[1].function])
  assert find_sinkhorn(model) == sites
  assert [site.path for site in find_sinkhorn(copy)] == [sites[1].path]
  assert copy.blocks[0].attention.attention_fn is softmax_attention
  copy.blocks[0].attention.out.kernel[...] = jnp.zeros((HEADS, DIM, WIDTH))
  models.assert_same_state(model, nnx.merge(nnx.graphdef(model), before))
  np.testing.assert_array_equal(models.forward(model, X), expected)


class Plain(nnx.Module):
  """Two layers, the first called twice, run by the transform under test."""

  def __init__(self, **options):
    self.shared = layer(3, nnx.Rngs(0), **options)
    self.last = layer(2, nnx.Rngs(1), epsilon=0.5)

  def run(self, x, mask):
    x = x + self.shared(x, mask=mask)
    x = x + self.shared(x, mask=mask)
    return x + self.last(x, mask=mask)

  def __call__(self, x, mask=None):
    return self.run(x, mask)


class Jitted(Plain):
  def __call__(self, x, mask=None):
    return nnx.jit(lambda model, x, mask: model.run(x, mask))(self, x, mask)


class Rematerialised(Plain):
  def __call__(self, x, mask=None):
    return nnx.remat(lambda model, x, mask: model.run(x, mask))(self, x, mask)


def expected_calls(model, x, valid):
  """Queries and keys, in NumPy, that each call of a `Plain` model sees."""
  calls, x = [], np.float64(x)
  for attention, iterations, epsilon in (
    (model.shared, 3, 1.0),
    (model.shared, 3, 1.0),
    (model.last, 2, 0.5),
  ):
    query, key, value = (
      np.einsum("bnf,fhd->bnhd", x, np.float64(linear.kernel[...]))
      for linear in (attention.query, attention.key, attention.value)
    )
    out, _ = references.attention(
      query, key, value, iterations, query_mask=valid, key_mask=valid, epsilon=epsilon
    )
    x = x + np.einsum("bnhd,hdf->bnf", out, np.float64(attention.out.kernel[...]))
    keep = valid[:, None, :, None]
    query, key = (np.moveaxis(y, 1, 2) * keep for y in (query, key))
    calls.append((query * DIM**-0.5 / epsilon, key))
  return calls


@pytest.mark.parametrize("kind", [Plain, Jitted, Rematerialised])
def test_recorder_returns_what_every_call_saw(kind):
  # Dropout is off while recording, whatever the state of the model.
  model = kind(dropout_rate=0.5)
  model.train()
  valid = np.arange(N) < np.array([[N], [4], [2]])
  sites = find_sinkhorn(model)
  assert [site.name for site in sites] == ["last", "shared"]
  record = recorder(model, sites, lambda model, batch: model(**batch))
  mask = nnx.make_attention_mask(jnp.asarray(valid), jnp.asarray(valid))
  (last,), shared = record({"x": X, "mask": mask})
  assert len(shared) == 2
  expected = expected_calls(model, X, valid)
  for actual, (query, key) in zip((*shared, last), expected, strict=True):
    np.testing.assert_allclose(actual.query, query, atol=2e-5)
    np.testing.assert_allclose(actual.key, key, atol=2e-5)
    logits = query @ np.swapaxes(key, -1, -2)
    np.testing.assert_allclose(actual.logits, logits, atol=1e-4)
    assert actual.bias is None
    assert actual.is_product
    for seen in (actual.query_mask, actual.key_mask):
      np.testing.assert_array_equal(seen, valid[:, None])
  assert not model.shared.deterministic


class Bare(nnx.Module):
  """Calls an attention function with a bias, several batch axes, grouped keys."""

  def __init__(self):
    self.function = functools.partial(sinkhorn_attention, iterations=2, scale=0.5)

  def __call__(self, query, key, bias):
    return self.function(query, key, key, bias, epsilon=2.0)


def test_recorder_flattens_batch_axes_and_sees_arguments_of_the_call():
  random = np.random.default_rng(1)
  query = random.normal(size=(2, 3, 5, 4, DIM)).astype(np.float32)
  key = random.normal(size=(2, 3, 7, 2, DIM)).astype(np.float32)
  bias = random.normal(size=(4, 5, 7)).astype(np.float32)
  model = Bare()
  record = recorder(model, find_sinkhorn(model), lambda model, batch: model(*batch))
  [(call,)] = record(tuple(map(jnp.asarray, (query, key, bias))))
  expected = np.moveaxis(query, -2, -3).reshape(6, 4, 5, DIM) * 0.5 / 2
  np.testing.assert_allclose(call.query, expected, atol=1e-6)
  repeated = np.repeat(np.moveaxis(key, -2, -3), 2, axis=-3).reshape(6, 4, 7, DIM)
  np.testing.assert_allclose(call.key, repeated, atol=1e-6)
  expected = expected @ np.swapaxes(repeated, -1, -2) + bias
  np.testing.assert_allclose(call.logits, expected, atol=1e-5)
  assert call.query_mask is None


def test_recorder_of_a_layer_that_is_not_called_is_empty():
  model = Plain()
  record = recorder(model, find_sinkhorn(model), lambda model, batch: model.last(batch))
  last, shared = record(X)
  assert (len(last), len(shared)) == (1, 0)
