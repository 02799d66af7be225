import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

import asap_jax
from asap_jax.attention import WatchedAttention
from asap_jax.compiler import CandidateAttention, Sinkhorn
from asap_jax.compiler.sites import find_held

NAMES = ["blocks.0.attention", "blocks.1.attention"]


def compiled():
  return models.compiled().model


@functools.cache
def watched():
  return asap_jax.monitor(compiled(), models.batches()[:4])


@functools.cache
def jitted():
  graph, state = nnx.split(watched())
  run = jax.jit(lambda state, x: asap_jax.watch(nnx.merge(graph, state), x))
  return functools.partial(run, state)


def shifted(x):
  return x * np.linspace(0.2, 3.0, x.shape[-1], dtype=np.float32)


def alarms(readings):
  return np.stack([reading.alarm for reading in readings.values()])


def test_a_watched_model_computes_what_it_did():
  x = models.batches()[5]
  expected = compiled()(x)
  np.testing.assert_array_equal(watched()(x), expected)
  out, readings = asap_jax.watch(watched(), x)
  np.testing.assert_array_equal(out, expected)
  assert list(readings) == NAMES
  assert alarms(readings).shape == (2, models.HEADS)


def test_it_is_silent_on_the_usual_and_fires_on_what_is_shifted():
  usual, other = models.batches()[4:]
  for x in (usual, other, usual[:1]):
    assert not alarms(jitted()(x)[1]).any()
  assert alarms(jitted()(shifted(usual))[1]).any()


def test_what_is_not_a_number_is_an_alarm():
  x = models.batches()[4].at[0, 0, 0].set(jnp.nan)
  assert alarms(jitted()(x)[1]).all()


def test_errors_are_those_of_values_and_outputs_of_each_call():
  x = models.batches()[4]
  seen = []

  def answer(name, given):
    from asap_jax.attention import functions, signature

    with signature.listening(None):
      out = getattr(functions, name)(**given)
    seen.append((np.asarray(given["value"]), np.asarray(out)))
    return out

  from asap_jax.attention.signature import answering

  with answering(answer):
    compiled()(x)
  _, readings = jitted()(x)
  for reading, (value, out) in zip(readings.values(), seen, strict=True):
    squares = []
    for v, o in zip(value, out, strict=True):
      moved = o.mean(0) - v.mean(0)
      power = ((v - v.mean(0)) ** 2).sum(-1).mean(0)
      squares.append((models.TOKENS - 1) * (moved**2).sum(-1) / power)
    expected = np.mean(squares, 0) ** 0.5
    np.testing.assert_allclose(reading.column_error, expected, rtol=1e-3)


def test_thresholds_are_of_the_sequences_of_all_batches_and_of_the_size():
  one = {}
  for batch in models.batches()[:4]:
    for x in batch:
      _, readings = jitted()(x[None])
      for name, reading in readings.items():
        one.setdefault(name, []).append(np.asarray(reading.column_error) ** 2)
  for size in (1, 16):
    _, readings = jitted()(models.batches()[4][:size])
    for name, reading in readings.items():
      mean, deviation = np.mean(one[name], 0), np.std(one[name], 0)
      expected = 1.25 * np.sqrt(mean + 4.0 * deviation / size**0.5)
      np.testing.assert_allclose(reading.threshold, expected, rtol=1e-3)


def test_it_reads_under_jit_and_vmap_and_closed_over():
  x = models.batches()[4]
  _, expected = asap_jax.watch(watched(), x)
  closed = jax.jit(lambda x: asap_jax.watch(watched(), x)[1])
  mapped = jax.vmap(lambda x: asap_jax.watch(watched(), x)[1])
  several = jax.tree.map(operator.itemgetter(0), mapped(x[None]))
  for found in (jitted()(x)[1], closed(x), several):
    for name in NAMES:
      error = found[name].column_error
      np.testing.assert_allclose(error, expected[name].column_error, rtol=1e-3)


def test_nothing_is_computed_or_kept_where_nobody_looks():
  x = models.batches()[4]
  assert str(jax.make_jaxpr(watched())(x)) == str(jax.make_jaxpr(compiled())(x))
  asap_jax.watch(watched(), x)
  assert not jax.tree.leaves(nnx.state(watched(), nnx.Intermediate))


def test_padding_shows_nothing():
  layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=1, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (6, 5, 8))
  call = lambda layer, given: layer(given[0], mask=given[1])  # noqa: E731
  watch = functools.partial(asap_jax.watch, call=call)
  valid = jnp.ones((6, 5), bool)
  full = x, nnx.make_attention_mask(valid, valid)
  attention = asap_jax.monitor(layer, [full], call=call)
  _, expected = watch(attention, full)
  padded = jnp.pad(valid, ((0, 2), (0, 3)))
  filled = jnp.pad(x, ((0, 2), (0, 3), (0, 0)), constant_values=7.0)
  _, found = watch(attention, (filled, nnx.make_attention_mask(padded, padded)))
  for one, other in zip(found["attention_fn"], expected["attention_fn"], strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-3)


def test_a_layer_that_is_called_twice_shows_the_worse():
  class Twice(nnx.Module):
    def __init__(self):
      self.attention = asap_jax.SinkhornMultiHeadAttention(
        2, 16, iterations=1, rngs=nnx.Rngs(0)
      )

    def __call__(self, x):
      return self.attention(x) + self.attention(shifted(x))

  model = asap_jax.monitor(Twice(), models.batches()[:2])
  x = models.batches()[4]
  found = asap_jax.watch(model, x)[1]["attention"]
  alone = [
    asap_jax.watch(model, each, call=lambda model, x: model.attention(x))[1]
    for each in (x, shifted(x))
  ]
  errors = [reading["attention"].column_error for reading in alone]
  np.testing.assert_allclose(found.column_error, jnp.maximum(*errors), rtol=1e-3)


def test_candidates_and_functions_in_containers_are_watched():
  tokens = jax.random.normal(jax.random.key(0), (8, 6, 2, 4))
  operators = {"teacher": Sinkhorn(20, "ott"), "sinkhorn@1": Sinkhorn(1)}
  kept = CandidateAttention(operators, dict.fromkeys(operators, (0.0,)), "sinkhorn@1")
  model = nnx.Dict(
    kept=kept, several=nnx.static({"exact": asap_jax.sinkhorn_attention})
  )

  def call(model, x):
    return model.kept(x, x, x), model.several["exact"](x, x, x)

  found = asap_jax.monitor(model, [tokens], call=call)
  assert len(find_held(found, WatchedAttention)) == 2
  _, readings = asap_jax.watch(found, tokens, call=call)
  assert sorted(readings) == ["kept", "several.exact"]
  assert (readings["several.exact"].column_error < 1e-2).all()
  assert (readings["kept"].column_error > 1e-2).all()


def test_thresholds_are_saved_with_the_model(tmp_path):
  asap_jax.save(tmp_path / "model", watched())
  loaded = asap_jax.load(tmp_path / "model", nnx.eval_shape(models.toy))
  x = models.batches()[4]
  out, readings = asap_jax.watch(loaded, x)
  expected, wanted = asap_jax.watch(watched(), x)
  np.testing.assert_array_equal(out, expected)
  assert list(readings) == list(wanted)
  for one, other in zip(*map(jax.tree.leaves, (readings, wanted)), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_compile_watches_with_what_it_held_out():
  recipe = asap_jax.Recipe(slices=2, refine_steps=0)
  batches = models.batches()
  options = {"progress": False, "monitor": True}
  found = asap_jax.compile(models.toy(), batches, recipe, **options).model
  (bare, _) = asap_jax.compile(models.toy(), batches, recipe, progress=False)
  expected = asap_jax.monitor(bare, [batches[1]])
  for one, other in zip(
    find_held(found, WatchedAttention).values(),
    find_held(expected, WatchedAttention).values(),
    strict=True,
  ):
    np.testing.assert_allclose(one.mean[...], other.mean[...], rtol=1e-5)


class Stacked(nnx.Module):
  """Blocks that a scan runs."""

  def __init__(self):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
      return models.Block(models.WIDTH, rngs)

    self.blocks = create(nnx.Rngs(0))

  def __call__(self, x):
    scan = nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return scan(lambda x, block: block(x))(x, self.blocks)


@pytest.mark.slow
def test_layers_of_a_scan_are_watched_each():
  model = asap_jax.monitor(Stacked(), models.batches()[:2])
  x = models.batches()[4]
  np.testing.assert_allclose(model(x), Stacked()(x), atol=1e-5)
  (reading,) = asap_jax.watch(model, x)[1].values()
  assert reading.threshold.shape == (2, models.HEADS)
  assert not reading.alarm.any()


def test_what_cannot_be_watched_is_refused():
  x = models.batches()[0]
  with pytest.raises(ValueError, match=r"margin=0\.5"):
    asap_jax.monitor(compiled(), [x], margin=0.5)
  with pytest.raises(ValueError, match="watched already"):
    asap_jax.monitor(watched(), [x])
  with pytest.raises(ValueError, match="no doubly stochastic attention"):
    asap_jax.monitor(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [x])
  with pytest.raises(ValueError, match="batches is empty"):
    asap_jax.monitor(compiled(), [])
  with pytest.raises(ValueError, match=r"blocks.1.attention: no call"):
    asap_jax.monitor(compiled(), [x], call=lambda model, x: model.blocks[0](x))
  with pytest.raises(ValueError, match="not watched"):
    asap_jax.watch(compiled(), x)
