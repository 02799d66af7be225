"""Classifiers that begin at a pretrained text encoder."""

import dataclasses
import pathlib

import jax
from flax import nnx

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.compiler.operators import bound_arguments
from experiments.common.attentions import build_attention
from experiments.downstream.data import Data, training_batches, whole_batches
from experiments.downstream.models import Batch
from experiments.downstream.presets import Preset
from experiments.downstream.roads import ROADS, convert, distil, distilling
from experiments.encoders import BertEncoder, TextCoder, directory_of, load_encoder
from experiments.encoders.bert import AttentionFn, BertConfig

# Training texts that doubly stochastic attention is refitted on. Tokens of one text
# have almost the same outputs there, so that texts count, more than tokens.
REFITTED = 2048


class Frozen(nnx.Variable):
  """A weight that is not trained."""


class PretrainedClassifier(nnx.Module):
  """A linear head on the mean of an encoder's last states, normed.

  Args:
    encoder: of texts.
    classes: labels.
    rngs: source of the head's weights, stream `params`.
  """

  def __init__(self, encoder: BertEncoder, classes: int, rngs: nnx.Rngs):
    width = encoder.config.hidden_size
    self.encoder = encoder
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, classes, rngs=rngs)

  def __call__(self, batch: Batch, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Class logits `[batch, classes]`; other entries of `batch` are not read."""
    tokens, valid = self.tokens(batch)
    return self.head(self.norm(self.encoder(tokens, valid, rngs)))

  def tokens(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What `states` takes of a batch: tokens, and which are no padding."""
    return batch["ids"], batch["valid"]

  def states(
    self,
    tokens: jax.Array,
    valid: jax.Array,
    rngs: nnx.Rngs | None = None,
    sow_weights: bool = False,
  ) -> list[jax.Array]:
    """As of the encoder."""
    return self.encoder.states(tokens, valid, rngs, sow_weights)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A pretrained encoder to begin at, and what of it is trained.

  Attributes:
    directory: with its files.
    frozen_layers: first layers that are not trained, as the embeddings are not.
  """

  directory: pathlib.Path
  frozen_layers: int = 0

  @classmethod
  def named(cls, name: str, preset: Preset, frozen_layers: int) -> "Pretrained":
    """Of a name or a path, once it can be read at the preset's length.

    Raises:
      ValueError: as `directory_of`, `load_encoder` and `TextCoder`; if texts are longer
        than the encoder's positions, its vocabulary is smaller than the tokenizer's, or
        there are fewer layers than are to be frozen.
    """
    found = cls(directory_of(name), frozen_layers)
    config = load_encoder(found.directory).config
    known = found.coder(preset).vocabulary_size
    if known > config.vocab_size:
      raise ValueError(
        f"{found.directory}: its tokenizer has {known} tokens, expected at most the "
        f"{config.vocab_size} of vocab_size"
      )
    if preset.length > config.max_position_embeddings:
      raise ValueError(
        f"{found.directory} has {config.max_position_embeddings} positions: expected "
        f"at least {preset.length}"
      )
    if frozen_layers > config.num_hidden_layers:
      raise ValueError(
        f"frozen_layers={frozen_layers}: expected at most the "
        f"{config.num_hidden_layers} of the encoder"
      )
    return found

  def coder(self, preset: Preset) -> TextCoder:
    """Its tokenizer, at the preset's length."""
    return TextCoder(self.directory / "tokenizer.json", preset.length, preset.keep)

  def build(
    self, name: str, preset: Preset, data: Data, seed: int
  ) -> PretrainedClassifier:
    """A classifier with a named attention and the pretrained weights.

    Doubly stochastic attention is refitted to what softmax gave on some training texts,
    and distilled for the preset's steps, without labels; others stand there as they
    are. `sinkhorn` is the preset's teacher, and of `ROADS` each leads there.

    Raises:
      ValueError: if the attention is unknown.
    """
    softmax = load_encoder(self.directory)
    encoder, converted = self._with_attention(softmax, name, preset, data, seed)
    freeze(encoder.words, encoder.positions, encoder.types, encoder.norm)
    if preset.distil_steps and (converted or name == "distil"):
      config = distilling(preset.distil_steps, preset.batch_size)
      batches = training_batches(data, preset.batch_size, seed)
      encoder = distil(encoder, softmax, batches, config, f"{name}, distilled")
    model = PretrainedClassifier(encoder, data.prepared.classes, nnx.Rngs(seed))
    freeze(*model.encoder.blocks[: self.frozen_layers])
    return model

  def _with_attention(
    self, softmax: BertEncoder, name: str, preset: Preset, data: Data, seed: int
  ) -> tuple[BertEncoder, bool]:
    """An encoder with a named attention, and whether it is to be distilled."""
    batches = whole_batches(data.train, None, REFITTED)
    road = name if name in ROADS else "distil"
    name = preset.teacher if name in ("sinkhorn", *ROADS) else name
    functions = attentions_of(name, softmax.config, seed)
    bound = bound_arguments(functions[0], sinkhorn_attention)
    if bound is not None:
      return convert(softmax, road, bound, batches), road == "distil"
    if name == "amortized":
      return convert(softmax, "refit", None, batches), False
    encoder = nnx.clone(softmax)
    if name != "softmax":
      for block, function in zip(encoder.blocks, functions, strict=True):
        kind = nnx.data if isinstance(function, nnx.Module) else nnx.static
        block.attention.attention_fn = kind(function)
    return encoder, False


def attentions_of(name: str, config: BertConfig, seed: int) -> list[AttentionFn]:
  """A named attention for every block of an encoder."""
  heads, dim = config.num_attention_heads, config.hidden_size
  rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
  return [
    build_attention(name, heads=heads, dim=dim // heads, layer=layer, rngs=rngs)
    for layer in range(1, config.num_hidden_layers + 1)
  ]


def freeze(*modules: nnx.Module) -> None:
  """Lets nothing in some modules be trained, in place, but for dual maps."""
  for module in modules:
    for _, each in nnx.iter_modules(module):
      for name, value in list(vars(each).items()):
        if type(value) is nnx.Param:
          setattr(each, name, Frozen(value[...]))
