"""Batches as loaders give them: pairs, dictionaries, streams; and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models

import asap_jax
from asap_jax.compiler.batches import Stored
from asap_jax.compiler.recording import Observer

COUNT, SIZE = 3, 4
VALID = jnp.arange(models.TOKENS) < 7


def tokens(count=COUNT):
  return [batch[:SIZE] for batch in models.batches()[:count]]


def observe(batches, call=lambda model, batch: model(batch)):
  return Observer(models.toy(depth=1), batches, call, progress=False)


def queries(observed):
  """Queries of the first layer, fitted and held out."""
  return [
    np.concatenate([np.asarray(calls[0][0].query) for calls in part])
    for part in observed.sample(1000)
  ]


PAIRS = {
  "label": (lambda x: (x, 3), lambda model, batch: model(batch[0])),
  "dict": (
    lambda x: {"tokens": x, "label": np.zeros(SIZE, int)},
    lambda model, batch: model(batch["tokens"]),
  ),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("read", [list, iter, lambda batches: (b for b in batches)])
def test_pairs_and_dictionaries_give_what_bare_tokens_give(kind, read):
  wrap, call = PAIRS[kind]
  observed = observe(read([wrap(x) for x in tokens()]), call)
  for actual, wanted in zip(queries(observed), queries(observe(tokens())), strict=True):
    np.testing.assert_array_equal(actual, wanted)
  # An iterator that can be read once is there for every pass.
  for _ in range(2):
    assert len(list(observed.activations("Reading"))) == 2


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_without_a_call_are_refused(kind):
  wrapped = [PAIRS[kind][0](x) for x in tokens()]
  with pytest.raises(ValueError, match=r"of type (tuple|dict).*pass call="):
    observe(wrapped)


@pytest.mark.parametrize(
  ("extra", "name"), [("a text", "str"), (np.array(["a", "b"]), "ndarray")]
)
def test_what_is_no_array_of_numbers_is_refused_by_its_place(extra, name):
  batches = [{"tokens": x, "text": extra} for x in tokens()]
  with pytest.raises(ValueError, match=rf"holds a {name} at \['text'\].*arrays alone"):
    observe(batches, lambda model, batch: model(batch["tokens"]))


def test_streams_without_end_are_read_as_far_as_needed():
  read = []

  def stream():
    for index in itertools.count():
      read.append(index)
      yield tokens()[index % COUNT]

  # Six sequences to fit on: two batches, and the one between them is held out.
  fitted, held_out = observe(stream()).sample(6)
  assert (len(fitted), len(held_out)) == (2, 1)
  assert read == [0, 1, 2]


class Reshuffled:
  """A loader with another order at every pass."""

  def __init__(self):
    self.passes = 0

  def __iter__(self):
    self.passes += 1
    order = np.random.default_rng(self.passes).permutation(6)
    return iter([models.batches()[i][:SIZE] for i in order])


def test_a_sample_of_a_loader_that_reshuffles_is_of_one_pass():
  loader = Reshuffled()
  fitted, held_out = queries(observe(loader))
  assert loader.passes == 1
  assert not (fitted[:, None] == held_out).all((2, 3, 4)).any()


def test_several_passes_over_a_loader_that_reshuffles_are_refused():
  observed = observe(Reshuffled())
  with pytest.raises(ValueError, match=r"another order than before.*an iterator"):
    list(observed.activations("Reading"))
  stored = observe(iter(Reshuffled()))
  first, second = (
    [np.asarray(calls[0][0].query) for calls in stored.activations("Reading")]
    for _ in range(2)
  )
  np.testing.assert_array_equal(first, second)


def masked(model, batch):
  x, valid, bias = batch
  attention = model.blocks[0].attention
  query, key, value = (p(x) for p in (attention.query, attention.key, attention.value))
  mask = nnx.make_attention_mask(valid, valid)
  return attention.attention_fn(query, key, value, bias, mask)


def padded(bias):
  valid = jnp.broadcast_to(VALID, (SIZE, models.TOKENS))
  pairs = nnx.make_attention_mask(valid, valid)
  return [(x, valid, jnp.where(pairs, 0.5, bias)) for x in tokens()]


@pytest.mark.parametrize("bias", [-jnp.inf, jnp.inf, jnp.nan])
def test_a_bias_at_padding_may_be_anything(bias):
  logits, expected = (
    observe(padded(each), masked).sample(1000)[0][0][0][0].logits
    for each in (bias, 0.0)
  )
  valid = VALID[:, None] & VALID
  np.testing.assert_array_equal(logits * valid, expected * valid)
  assert jnp.isfinite(logits).all()


def test_a_bias_that_excludes_valid_keys_is_refused():
  batches = [(x, v, b.at[..., 0].set(-jnp.inf)) for x, v, b in padded(0.0)]
  observed = observe(batches, masked)
  with pytest.raises(ValueError, match=r"attention: bias is not finite.*pass mask="):
    observed.sample(10)


def test_held_out_batches_of_padding_alone_are_refused():
  batches = padded(0.0)
  batches[1] = (batches[1][0], jnp.zeros_like(batches[1][1]), batches[1][2])
  observed = observe(batches, masked)
  with pytest.raises(ValueError, match=r"held out .* hold padding alone"):
    observed.sample(10)
  with pytest.raises(ValueError, match=r"held out .* hold padding alone"):
    list(observed.activations("Reading", held_out=True))


def test_stored_batches_are_read_once():
  read = []
  stored = Stored(read.append(i) or i for i in range(4))
  assert next(iter(stored)) == 0
  assert read == [0]
  assert list(stored) == list(stored) == [0, 1, 2, 3]
  assert read == [0, 1, 2, 3]


def test_a_target_that_no_distance_can_be_is_refused():
  for target in (2.0, -0.1, float("nan")):
    with pytest.raises(ValueError, match=r"target_tv=.*from 0 to 1"):
      asap_jax.compile(models.toy(depth=1), tokens(), target_tv=target)


def test_keys_of_random_numbers_may_lie_in_batches():
  batches = [{"x": x, "key": jax.random.key(0)} for x in tokens()]
  observed = observe(batches, lambda model, batch: model(batch["x"]))
  assert len(list(observed.activations("Reading"))) == 2
