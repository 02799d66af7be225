"""Encoders against a NumPy transcription, and what padding and dropout do to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import asap_jax
from experiments.common.models import Encoder, EncoderConfig
from experiments.datasets.prepare import Prepared
from experiments.downstream import training
from experiments.downstream.models import TextEncoder, VisionTransformer, patches
from experiments.downstream.presets import build, encoder_config, preset_of

CONFIG = EncoderConfig(
  length=7, token_size=20, classes=3, width=8, heads=2, layers=2, positions=0.3
)
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(20, size=(5, 7))
VALID = np.arange(7) < np.array([7, 1, 3, 5, 6])[:, None]
SINKHORN = functools.partial(asap_jax.sinkhorn_attention, iterations=3)


def batch(ids=IDS, valid=VALID):
  return {"ids": jnp.asarray(ids), "valid": jnp.asarray(valid)}


@functools.cache
def text_encoder(function=asap_jax.softmax_attention, **changes):
  return TextEncoder(dataclasses.replace(CONFIG, **changes), function, nnx.Rngs(0))


@nnx.jit
def forward(model, inputs, rngs=None):
  return model(inputs, rngs)


def transcription(model, ids, valid):
  """Class logits of one text without its padding, float64."""
  array = lambda variable: np.asarray(variable[...], np.float64)  # noqa: E731

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return scaled * array(layer.scale) + array(layer.bias)

  def linear(layer, x):
    return x @ array(layer.kernel) + array(layer.bias)

  x = (array(model.embed.embedding)[ids] + array(model.positions))[valid]
  for block in model.blocks:
    attention, y = block.attention, norm(block.attention_norm, x)
    query, key, value = (
      np.einsum("nw,whd->hnd", y, array(part.kernel)) + array(part.bias)[:, None]
      for part in (attention.query, attention.key, attention.value)
    )
    weights = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1]))
    weights = weights / weights.sum(-1, keepdims=True)
    attended = np.einsum("hnd,hdw->nw", weights @ value, array(attention.out.kernel))
    x = x + attended + array(attention.out.bias)
    y = linear(block.mlp_in, norm(block.mlp_norm, x))
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + linear(block.mlp_out, gelu)
  return linear(model.head, norm(model.norm, x).mean(0))


def test_texts_against_a_transcription():
  found = forward(text_encoder(), batch())
  assert found.shape == (5, 3)
  for row, ids, valid in zip(found, IDS, VALID, strict=True):
    expected = transcription(text_encoder(), ids, valid)
    np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [asap_jax.softmax_attention, SINKHORN])
def test_padding_has_no_influence(function):
  model = text_encoder(function)
  other = np.where(VALID, IDS, (IDS + 7) % 20)
  found = forward(model, batch())
  np.testing.assert_array_equal(found, forward(model, batch(other)))
  # A valid token has.
  moved = np.where(VALID, (IDS + 7) % 20, IDS)
  assert np.abs(found - forward(model, batch(moved))).max(-1).min() > 1e-3


def test_embeddings_of_padding_are_not_trained():
  ids = np.where(VALID, IDS % 10, 10 + IDS % 10)

  @nnx.jit
  def slopes(model):
    loss = lambda model: (model(batch(ids)) ** 2).sum()  # noqa: E731
    return nnx.grad(loss)(model).embed.embedding[...]

  found = np.abs(np.asarray(slopes(text_encoder(SINKHORN)))).sum(-1)
  used = np.isin(np.arange(20), ids[VALID])
  assert (found[used] > 0).all()
  np.testing.assert_array_equal(found[~used], 0.0)


def test_dropout_needs_random_numbers():
  model = text_encoder(dropout=0.5, token_dropout=0.5)
  plain = forward(text_encoder(), batch())
  np.testing.assert_array_equal(forward(model, batch()), plain)
  one, again, other = (
    forward(model, batch(), nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3
  assert np.abs(one - plain).max() > 1e-3


def test_whole_tokens_are_dropped():
  model = text_encoder(token_dropout=0.3)
  valid = jnp.ones((400, 7), bool)
  ids = jnp.ones((400, 7), int)
  states = model.states(ids, valid, nnx.Rngs(dropout=0))
  kept = np.asarray((states[0] != 0).any(-1))
  np.testing.assert_array_equal(kept, np.asarray((states[0] != 0).all(-1)))
  assert 1 - kept.mean() == pytest.approx(0.3, abs=0.05)
  # What is kept is larger by as much as is dropped.
  undropped = model.states(ids, valid)[0]
  np.testing.assert_allclose(states[0][kept], undropped[kept] / 0.7, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same():
  plain = forward(text_encoder(SINKHORN), batch())
  model = text_encoder(SINKHORN, dtype="bfloat16")
  found = forward(model, batch())
  assert found.dtype == jnp.float32
  assert model.states(IDS, VALID)[-1].dtype == jnp.bfloat16
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert {leaf.dtype for leaf in params} == {jnp.dtype("float32")}
  difference = np.abs(found - plain).max()
  assert 0 < difference < 0.1 * np.abs(plain).max()


def test_patches_are_squares_row_by_row():
  images = RANDOM.normal(size=(2, 6, 9, 2)).astype(np.float32)
  found = patches(jnp.asarray(images), 3)
  assert found.shape == (2, 6, 18)
  for place in range(6):
    row, column = divmod(place, 3)
    square = images[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
    np.testing.assert_array_equal(found[:, place], square.reshape(2, -1))


@pytest.mark.parametrize("convolutions", [False, True])
def test_tokens_of_images_see_their_patch(convolutions):
  config = EncoderConfig(length=6, token_size=32, classes=3, width=8, layers=1)
  model = VisionTransformer(
    config,
    asap_jax.softmax_attention,
    nnx.Rngs(0),
    patch=4,
    channels=2,
    convolutions=convolutions,
  )
  images = jnp.asarray(RANDOM.normal(size=(1, 8, 12, 2)), jnp.float32)

  def token(images, place):
    tokens = images if convolutions else patches(images, 4)
    return (model.embed(tokens)[0, place] ** 2).sum()

  for place in range(6):
    row, column = divmod(place, 3)
    slope = np.abs(jax.grad(token)(images, place))[0].sum(-1)
    inside = slope[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    assert (inside > 0).all()
    if not convolutions:
      assert inside.sum() == pytest.approx(slope.sum())
  assert forward(model, {"image": images}).shape == (1, 3)


def test_sizes_that_do_not_fit():
  with pytest.raises(ValueError, match="6 x 9: expected multiples of the patch, 4"):
    patches(jnp.zeros((1, 6, 9, 1)), 4)
  with pytest.raises(ValueError, match="attention_fn has 1 functions: expected 2"):
    Encoder(CONFIG, [asap_jax.softmax_attention], nnx.Rngs(0))
  with pytest.raises(ValueError, match="patch=6: expected a power of two"):
    VisionTransformer(
      CONFIG, asap_jax.softmax_attention, nnx.Rngs(0), patch=6, convolutions=True
    )


TEXTS = Prepared("texts", "text", {}, {}, 14, (), vocabulary_size=500, length=512)
IMAGES = Prepared("images", "image", {}, {}, 100, (), image_shape=(32, 32, 3))
LARGE = Prepared("large", "image", {}, {}, 2, (), image_shape=(224, 224, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("prepared", "length", "token_size"),
  [(TEXTS, 512, 500), (IMAGES, 64, 48), (LARGE, 196, 768)],
)
def test_models_of_the_paper_can_be_built_and_trained(prepared, length, token_size):
  preset = preset_of("paper", prepared.kind, prepared.name)
  config = encoder_config(preset, prepared)
  assert (config.layers, config.width, config.heads) == (6, 256, 8)
  assert (config.length, config.token_size) == (length, token_size)
  assert config.dtype == "bfloat16"
  if prepared.kind == "text":
    inputs = {"ids": jnp.zeros((2, 512), int), "valid": jnp.ones((2, 512), bool)}
  else:
    inputs = {"image": jnp.zeros((2, *prepared.image_shape))}
  inputs["label"] = jnp.zeros(2, int)

  def step():
    model = build("sinkhorn", preset, prepared, seed=0)
    state = training.start(model, preset.training(), seed=0)
    graph = nnx.graphdef(model)
    return training.step(graph, preset.training(), state, inputs, 1)

  state, (loss, accuracy) = jax.eval_shape(step)
  assert loss.shape == accuracy.shape == ()
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))


def test_images_that_patches_do_not_divide():
  odd = IMAGES._replace(image_shape=(30, 30, 3))
  with pytest.raises(ValueError, match="images are 30 x 30: expected multiples of"):
    encoder_config(preset_of("tiny", "image", "odd"), odd)


def test_a_configuration_of_a_data_set_has_its_preset():
  plain = preset_of("tiny", "text", "imdb_reviews/plain_text:1.0.0")
  assert plain == preset_of("tiny", "text", "imdb_reviews")
  assert plain != preset_of("tiny", "text", "ag_news_subset")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_teacher_of_few_iterations_is_a_preset(kind):
  few, tiny = (preset_of(size, kind, "imdb_reviews") for size in ("few", "tiny"))
  prepared = {"text": TEXTS, "image": IMAGES}[kind]
  bound = [
    build("sinkhorn", preset, prepared, seed=0).blocks[0].attention.attention_fn
    for preset in (few, tiny)
  ]
  assert bound[0].keywords == {"iterations": 2, "start": "gaussian"}
  assert bound[1] is asap_jax.sinkhorn_attention or not bound[1].keywords
  assert few.training() == tiny.training()
