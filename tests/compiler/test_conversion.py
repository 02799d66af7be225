"""Softmax attention made doubly stochastic: found, kept, refused and reported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax

VALID = jnp.arange(6) < jnp.array([6, 4, 5, 3])[:, None]
INPUTS = jax.random.normal(jax.random.key(0), (4, 6, 8))
# Quick to compile.
QUICK = {"iterations": 1, "start": "zero"}
OWN = functools.partial(asap_jax.sinkhorn_attention, **QUICK)
convert = functools.partial(asap_jax.to_sinkhorn, **QUICK)


def layer(seed=0, **options):
  return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(seed), **options)


class Stack(nnx.Module):
  """Two layers with residual connections, and padding."""

  def __init__(self, **options):
    self.layers = nnx.List([layer(seed, **options) for seed in range(2)])

  def __call__(self, batch):
    x, valid = batch
    mask = nnx.make_attention_mask(valid, valid)
    for each in self.layers:
      x = x + each(x, mask=mask)
    return x


@pytest.mark.parametrize(
  "function",
  [
    nnx.dot_product_attention,
    jax.nn.dot_product_attention,
    asap_jax.softmax_attention,
    functools.partial(asap_jax.softmax_attention, scale=0.3),
    functools.partial(jax.nn.dot_product_attention, scale=0.3, implementation="xla"),
    jax.jit(jax.nn.dot_product_attention),
  ],
)
def test_any_softmax_attention_is_found_and_its_scale_stays(function):
  class Own(nnx.Module):
    def __init__(self):
      self.attend = {"here": function}

    def __call__(self, x):
      return self.attend["here"](x, x, x)

  scale = function.keywords if isinstance(function, functools.partial) else {}
  tokens = INPUTS.reshape(4, 6, 2, 4)
  model, report = convert(Own())
  expected = OWN(tokens, tokens, tokens, scale=scale.get("scale"))
  np.testing.assert_allclose(model(tokens), expected, atol=1e-6)
  assert [each.name for each in report.layers] == ["attend.here"]
  assert np.isnan(report.layers[0].tv).all()
  assert np.isnan(report.cosine)


def test_weights_and_masks_stay_and_the_original_too():
  softmax = Stack()
  before = softmax((INPUTS, VALID))
  model, _ = convert(softmax)
  expected = Stack(attention_fn=OWN)
  np.testing.assert_array_equal(model((INPUTS, VALID)), expected((INPUTS, VALID)))
  np.testing.assert_array_equal(softmax((INPUTS, VALID)), before)


def test_chosen_layers_one_after_the_other_are_all():
  first, report = convert(Stack(), names=["layers.0"])
  assert [each.name for each in report.layers] == ["layers.0"]
  assert first.layers[1].attention_fn is nnx.dot_product_attention
  second, _ = convert(first, names=["layers.1"])
  both, _ = convert(Stack())
  left, _ = convert(Stack(), leave=["layers.1"])
  np.testing.assert_array_equal(second((INPUTS, VALID)), both((INPUTS, VALID)))
  np.testing.assert_array_equal(left((INPUTS, VALID)), first((INPUTS, VALID)))


def test_a_converted_model_can_be_compiled():
  model, _ = convert(layer(), iterations=2)
  exact = asap_jax.compiler.Sinkhorn(1)
  compiled, _ = asap_jax.compile(model, [INPUTS, INPUTS], exact, progress=False)
  assert compiled(INPUTS).shape == INPUTS.shape


def plans(model, valid):
  """Weights of the first layer on its inputs, `[batch, heads, n, n]`, by NumPy."""
  first = model.layers[0]
  q, k = (np.asarray(f(INPUTS), np.float64) for f in (first.query, first.key))
  logits = np.einsum("bnhd,bmhd->bhnm", q, k) / 2
  kernel = np.exp(logits) * valid[:, None, :, None] * valid[:, None, None, :]
  return kernel / np.maximum(kernel.sum(-1, keepdims=True), 1e-30)


def test_the_report_measures_plans_and_outputs():
  softmax, valid = Stack(), np.asarray(VALID)
  batches = [(INPUTS[:2], VALID[:2]), (INPUTS[2:], VALID[2:])]
  model, report = convert(softmax, iterations=40, batches=batches)
  soft = plans(softmax, valid)
  # Converged, by a loop.
  ends = soft.copy()
  for _ in range(2000):
    ends /= np.maximum(ends.sum(-2, keepdims=True), 1e-30)
    ends /= np.maximum(ends.sum(-1, keepdims=True), 1e-30)
  rows = valid.sum()
  tv = 0.5 * np.abs(ends - soft).sum((0, 2, 3)) / rows
  error = np.abs(soft.sum(-2) - 1) * valid[:, None, :]
  first = report.layers[0]
  np.testing.assert_allclose(first.tv, tv, atol=1e-4)
  np.testing.assert_allclose(
    first.softmax_column_error, error.sum((0, 2)) / rows, atol=1e-5
  )
  assert first.column_error.max() < 1e-4
  value = np.asarray(softmax.layers[0].value(INPUTS), np.float64)
  outs = [np.einsum("bhnm,bmhd->bnhd", each, value) for each in (soft, ends)]
  moved = np.linalg.norm(outs[1] - outs[0]) / np.linalg.norm(outs[0])
  assert first.output == pytest.approx(moved, abs=1e-4)
  old, new = (np.asarray(each((INPUTS, VALID))) for each in (softmax, model))
  cosines = (old * new).sum(-1)
  cosines /= np.linalg.norm(old, axis=-1) * np.linalg.norm(new, axis=-1)
  assert report.cosine == pytest.approx(cosines.mean(), abs=1e-5)
  ratio = np.linalg.norm(new - old) / np.linalg.norm(old)
  assert report.output == pytest.approx(ratio, abs=1e-5)
  assert "layers.1" in str(report)
  assert f"cosine {report.cosine:.3f}" in str(report)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_refit_is_ridge_regression_on_what_softmax_gave(use_bias):
  softmax = layer(use_bias=use_bias)
  batch = jax.random.normal(jax.random.key(1), (40, 6, 8))
  plain, _ = convert(softmax)
  model, report = convert(softmax, refit=True, batches=[batch])

  def heads(model):
    q, k, v = (f(batch) for f in (model.query, model.key, model.value))
    return np.asarray(model.attention_fn(q, k, v), np.float64).reshape(-1, 8)

  u, o = heads(plain), heads(softmax)
  du, do = (u - u.mean(0), o - o.mean(0)) if use_bias else (u, o)
  ridge = 0.01 * np.trace(du.T @ du) / 8
  # As one least-squares problem, with rows for the penalty.
  root = np.sqrt(ridge) * np.eye(8)
  w = np.linalg.lstsq(np.r_[du, root], np.r_[do, root], rcond=None)[0]
  fitted = du @ w + (o.mean(0) if use_bias else 0)
  kernel = np.asarray(softmax.out.kernel[...], np.float64).reshape(8, 8)
  expected = (fitted @ kernel).reshape(batch.shape)
  np.testing.assert_allclose(model(batch), expected, atol=2e-5)
  found = report.layers[0].output
  assert found == pytest.approx(np.linalg.norm(fitted - o) / np.linalg.norm(o), 1e-3)
  _, before = convert(softmax, batches=[batch])
  assert found < before.layers[0].output
  assert report.output < before.output


def test_a_refit_is_measured_on_batches_that_it_did_not_see():
  batches = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
  _, report = convert(layer(), refit=True, batches=batches)
  # The second is held out: only what is measured depends on it.
  model, other = convert(layer(), refit=True, batches=[batches[0], 2 * batches[1]])
  again, _ = convert(layer(), refit=True, batches=[batches[0]])
  assert report.output != other.output
  np.testing.assert_array_equal(model(INPUTS), again(INPUTS))


def test_stacked_layers_are_reported_and_refitted_one_by_one():
  class Scanned(nnx.Module):
    def __init__(self):
      make = nnx.vmap(
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
      )
      self.layer = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
      step = nnx.scan(
        lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )
      return step(x, self.layer)

  batches = [jax.random.normal(jax.random.key(1), (40, 6, 8))]
  _, before = convert(Scanned(), batches=batches)
  model, report = convert(Scanned(), refit=True, batches=batches)
  assert [each.name for each in report.layers] == [f"layer[{i}]" for i in range(3)]
  assert len({each.output for each in report.layers}) == 3
  for one, other in zip(report.layers, before.layers, strict=True):
    assert one.output < other.output
  assert report.output < before.output
  assert model(batches[0]).shape == (40, 6, 8)


def test_layers_with_one_query_stay_softmax():
  class Pooled(nnx.Module):
    def __init__(self):
      self.encode, self.pool = layer(0), layer(1)

    def __call__(self, x):
      x = self.encode(x)
      return self.pool(x[:, :1], x)

  model, report = convert(Pooled(), batches=[INPUTS])
  assert report.kept == ("pool",)
  assert [each.name for each in report.layers] == ["encode"]
  assert model.pool.attention_fn is nnx.dot_product_attention
  assert "pool: stays softmax" in str(report)


@pytest.mark.slow
def test_amortized_attention_takes_the_mode_of_its_module_and_is_measured():
  model, report = convert(layer(), amortized=True, batches=[INPUTS])
  attention = model.attention_fn
  assert isinstance(attention, asap_jax.AmortizedAttention)
  assert not attention.deterministic
  model.eval()
  difference = model(INPUTS) - layer()(INPUTS)
  ratio = jnp.linalg.norm(difference) / jnp.linalg.norm(layer()(INPUTS))
  assert report.output == pytest.approx(float(ratio), abs=1e-5)
  frozen = Stack()
  frozen.eval()
  assert convert(frozen, amortized=True)[0].layers[1].attention_fn.deterministic


def causal(model, x):
  return model(x, mask=nnx.make_causal_mask(x[..., 0]))


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "holds no softmax attention"),
    ({"names": ["other"]}, r"held at \['other'\].*attention_fn"),
    ({"leave": ["other"]}, r"held at \['other'\]"),
    ({"iterations": 0, "start": "zero"}, "iterations=0"),
    ({"batches": [INPUTS], "call": causal}, "attention_fn: its mask is not the outer"),
    ({"refit": True}, "batches is empty"),
    (
      {"model": nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))},
      "decode=True",
    ),
    (
      {"attention_fn": functools.partial(asap_jax.softmax_attention, is_causal=True)},
      "is_causal=True",
    ),
    (
      {
        "attention_fn": functools.partial(
          jax.nn.dot_product_attention, local_window_size=2
        )
      },
      "binds local_window_size",
    ),
    (
      {"model": nnx.Dict(f=asap_jax.softmax_attention), "amortized": True},
      "num_heads and head_dim",
    ),
    (
      {
        "model": nnx.Dict(f=asap_jax.softmax_attention),
        "refit": True,
        "batches": [INPUTS],
      },
      "held by a Dict; expected an nnx.MultiHeadAttention",
    ),
  ],
)
def test_what_cannot_be_is_refused(options, words):
  options = dict(options)
  given = {k: options.pop(k) for k in ("attention_fn",) if k in options}
  model = options.pop("model", None) or layer(**given)
  with pytest.raises(ValueError, match=words):
    convert(model, **options)


def test_padding_that_still_asks_is_warned_of():
  def call(model, x):
    return model(x, mask=jnp.broadcast_to(VALID[:, None, None], (4, 1, 6, 6)))

  with pytest.warns(UserWarning, match="padding out of the keys but not"):
    convert(layer(), batches=[INPUTS], call=call)
