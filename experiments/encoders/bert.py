"""BERT's encoder (Devlin et al., 2019, arXiv 1810.04805) with any attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import asap_jax

AttentionFn = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": lambda x: nnx.gelu(x, approximate=False),
  "gelu_new": nnx.gelu,
  "relu": nnx.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """Sizes of an encoder, under the names that a `config.json` has for them."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  type_vocab_size: int = 2
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-12
  hidden_dropout_prob: float = 0.1


class BertBlock(nnx.Module):
  """Attention and MLP, each with a residual connection and a layer norm after it."""

  def __init__(self, config: BertConfig, attention_fn: AttentionFn, rngs: nnx.Rngs):
    width = config.hidden_size
    self.attention = nnx.MultiHeadAttention(
      config.num_attention_heads,
      width,
      attention_fn=attention_fn,
      decode=False,
      rngs=rngs,
    )
    self.attention_norm = layer_norm(config, rngs)
    self.mlp_in = nnx.Linear(width, config.intermediate_size, rngs=rngs)
    self.mlp_out = nnx.Linear(config.intermediate_size, width, rngs=rngs)
    self.mlp_norm = layer_norm(config, rngs)
    self.dropout = nnx.Dropout(config.hidden_dropout_prob)
    self.activation = config.hidden_act

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array,
    rngs: nnx.Rngs | None = None,
    sow_weights: bool = False,
  ) -> jax.Array:
    """`[batch, length, width]` to an array like it; dropout where `rngs` are given."""
    drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)  # noqa: E731
    attended = self.attention(x, mask=mask, sow_weights=sow_weights)
    x = self.attention_norm(x + drop(attended))
    inner = ACTIVATIONS[self.activation](self.mlp_in(x))
    return self.mlp_norm(x + drop(self.mlp_out(inner)))


class BertEncoder(nnx.Module):
  """Token ids to states, and to one embedding of each text.

  Args:
    config: sizes.
    rngs: source of the weights, stream `params`.
    attention_fn: of all layers.

  Raises:
    ValueError: if the heads do not divide the width, or the activation is unknown.
  """

  def __init__(
    self,
    config: BertConfig,
    rngs: nnx.Rngs,
    attention_fn: AttentionFn = asap_jax.softmax_attention,
  ):
    if config.hidden_size % config.num_attention_heads:
      raise ValueError(
        f"hidden_size={config.hidden_size}: expected a multiple of the "
        f"{config.num_attention_heads} heads"
      )
    if config.hidden_act not in ACTIVATIONS:
      raise ValueError(
        f"hidden_act={config.hidden_act!r}: expected one of {', '.join(ACTIVATIONS)}"
      )
    width = config.hidden_size
    self.config = config
    self.words = nnx.Embed(config.vocab_size, width, rngs=rngs)
    self.positions = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
    self.types = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
    self.norm = layer_norm(config, rngs)
    self.dropout = nnx.Dropout(config.hidden_dropout_prob)
    self.blocks = nnx.List(
      BertBlock(config, attention_fn, rngs) for _ in range(config.num_hidden_layers)
    )

  def __call__(
    self, ids: jax.Array, valid: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Embeddings of texts, `[batch, width]`: the mean of their valid tokens' states.

    Args:
      ids: of tokens, `[batch, length]`.
      valid: which are no padding, `[batch, length]`, at least one of each text.
      rngs: stream `dropout`, for training; without it none is dropped.

    Raises:
      ValueError: if there are more tokens than positions.
    """
    return mean_of_valid(self.states(ids, valid, rngs)[-1], valid)

  def states(
    self,
    ids: jax.Array,
    valid: jax.Array,
    rngs: nnx.Rngs | None = None,
    sow_weights: bool = False,
  ) -> list[jax.Array]:
    """Embedded tokens, then the output of every block, `[batch, length, width]` each.

    `sow_weights` keeps the weights of all attentions as `nnx.Intermediate`. See
    `__call__` for what is raised.
    """
    length, most = ids.shape[-1], self.config.max_position_embeddings
    if length > most:
      raise ValueError(
        f"ids have {length} tokens: expected at most {most}, by position"
      )
    mask = nnx.make_attention_mask(valid, valid, dtype=bool)
    x = self.words(ids) + self.positions(jnp.arange(length)) + self.types.embedding[0]
    x = self.dropout(self.norm(x), deterministic=rngs is None, rngs=rngs)
    states = [x]
    for block in self.blocks:
      states.append(block(states[-1], mask, rngs, sow_weights))
    return states


def mean_of_valid(states: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean over the valid tokens, `[batch, length, width]` to `[batch, width]`."""
  weight = valid[..., None].astype(jnp.float32)
  return jnp.where(weight > 0, states, 0.0).sum(-2) / weight.sum(-2)


def layer_norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """A layer norm that computes as the reference does."""
  options: dict[str, Any] = {"epsilon": config.layer_norm_eps, "rngs": rngs}
  return nnx.LayerNorm(config.hidden_size, use_fast_variance=False, **options)
