"""A tiny encoder with random weights, as a Hugging Face directory."""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrst"]
CONFIG = {
  "model_type": "bert",
  "vocab_size": len(WORDS),
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": 12,
  "max_position_embeddings": 16,
  "type_vocab_size": 2,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
}


def arrays(config, seed=0):
  """Random weights under the names of a `model.safetensors`."""
  random = np.random.default_rng(seed)
  width, inner = config["hidden_size"], config["intermediate_size"]
  shapes = {
    "embeddings.word_embeddings.weight": (config["vocab_size"], width),
    "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
    "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], width),
    "embeddings.LayerNorm.weight": (width,),
    "embeddings.LayerNorm.bias": (width,),
    "pooler.dense.weight": (width, width),
  }
  for i in range(config["num_hidden_layers"]):
    layer = f"encoder.layer.{i}"
    for name, sizes in (
      ("attention.self.query", (width, width)),
      ("attention.self.key", (width, width)),
      ("attention.self.value", (width, width)),
      ("attention.output.dense", (width, width)),
      ("attention.output.LayerNorm", (width,)),
      ("intermediate.dense", (inner, width)),
      ("output.dense", (width, inner)),
      ("output.LayerNorm", (width,)),
    ):
      shapes[f"{layer}.{name}.weight"] = sizes
      shapes[f"{layer}.{name}.bias"] = sizes[:1]
  return {
    name: random.normal(0, 0.5, shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def tokenizer():
  """Words of one letter, between two special tokens."""
  found = Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
  )
  found.pre_tokenizer = pre_tokenizers.Whitespace()
  found.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  # What a file says of both must not matter.
  found.enable_truncation(4)
  found.enable_padding(length=4)
  return found


def write(directory, *, config=CONFIG, weights=None, prefix=""):
  """Writes the three files; returns the directory."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "config.json").write_text(json.dumps(config))
  weights = arrays(config) if weights is None else weights
  named = {prefix + name: array for name, array in weights.items()}
  save_file(named, directory / "model.safetensors")
  tokenizer().save(str(directory / "tokenizer.json"))
  return directory
