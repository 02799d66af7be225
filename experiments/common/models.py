"""The models that experiments train."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import asap_jax

AttentionFn = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Sizes of a pre-norm Transformer encoder for classification.

  Attributes:
    length: tokens.
    token_size: features of a token, or size of the vocabulary for token ids.
    classes: labels.
    width: features inside.
    heads: of attention.
    layers: attention and MLP blocks.
    positions: deviation of the position embeddings at first.
    dropout: share of a residual branch's features that training drops.
    token_dropout: share of whole tokens whose embedding training drops.
    dtype: of what is computed; parameters are float32.
  """

  length: int
  token_size: int
  classes: int
  width: int = 32
  heads: int = 2
  layers: int = 2
  positions: float = 0.5
  dropout: float = 0.0
  token_dropout: float = 0.0
  dtype: str = "float32"


class Block(nnx.Module):
  """Attention and MLP, each behind a layer norm and beside a residual connection."""

  def __init__(self, config: EncoderConfig, attention_fn: AttentionFn, rngs: nnx.Rngs):
    width = config.width
    own: dict[str, Any] = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
    self.attention_norm = nnx.LayerNorm(width, **own)
    self.attention = nnx.MultiHeadAttention(
      config.heads, width, attention_fn=attention_fn, decode=False, **own
    )
    self.mlp_norm = nnx.LayerNorm(width, **own)
    self.mlp_in = nnx.Linear(width, 2 * width, **own)
    self.mlp_out = nnx.Linear(2 * width, width, **own)
    self.dropout = nnx.Dropout(config.dropout)

  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
    sow_weights: bool = False,
  ) -> jax.Array:
    """`[batch, length, width]` to an array like it; `mask` as in attention functions.

    Features are dropped if `rngs` has a stream `dropout`.
    """
    drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)  # noqa: E731
    normed = self.attention_norm(x)
    x = x + drop(self.attention(normed, mask=mask, sow_weights=sow_weights))
    return x + drop(self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x)))))


class Classifier(nnx.Module):
  """A Transformer encoder with a linear head on the mean of its last states.

  Subclasses say what they are called with.

  Args:
    config: sizes.
    attention_fn: for all blocks, or a sequence with one for each of them.
    rngs: source of the weights, stream `params`.
  """

  def __init__(
    self,
    config: EncoderConfig,
    attention_fn: AttentionFn | Sequence[AttentionFn],
    rngs: nnx.Rngs,
  ):
    functions: Sequence[AttentionFn]
    if isinstance(attention_fn, Sequence):
      functions = attention_fn
    else:
      functions = [attention_fn] * config.layers
    if len(functions) != config.layers:
      raise ValueError(
        f"attention_fn has {len(functions)} functions: expected {config.layers}, one "
        "for every block"
      )
    self.embed = self._embedding(config, rngs)
    positions = jax.random.normal(rngs.params(), (config.length, config.width))
    self.positions = nnx.Param(config.positions * positions)
    self.blocks = nnx.List([Block(config, function, rngs) for function in functions])
    dtype = jnp.dtype(config.dtype)
    self.norm = nnx.LayerNorm(config.width, dtype=dtype, rngs=rngs)
    self.head = nnx.Linear(config.width, config.classes, rngs=rngs)
    self.token_dropout = nnx.Dropout(config.token_dropout, broadcast_dims=(-1,))
    self.dtype = dtype

  def logits(
    self,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """Class logits of tokens, float32.

    Args:
      tokens: `[batch, length, token_size]`.
      valid: which tokens are no padding, `[batch, length]`, at least one of each
        sequence; all by default. What stands at padding has no influence.
      rngs: stream `dropout`, for training with dropout; without it, none is dropped.
    """
    x = self.norm(self.states(tokens, valid, rngs)[-1]).astype(jnp.float32)
    if valid is None:
      return self.head(x.mean(-2))
    weight = valid[..., None].astype(jnp.float32)
    pooled = jnp.where(weight > 0, x, 0.0).sum(-2) / weight.sum(-2)
    return self.head(pooled)

  def states(
    self,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
    sow_weights: bool = False,
  ) -> list[jax.Array]:
    """Embedded tokens, then the output of every block, `[batch, length, width]` each.

    `sow_weights` keeps the weights of all attentions as `nnx.Intermediate`.
    """
    mask = None if valid is None else nnx.make_attention_mask(valid, valid)
    x = self.embed(tokens) + self.positions[...].astype(self.dtype)
    states = [self.token_dropout(x, deterministic=rngs is None, rngs=rngs)]
    for block in self.blocks:
      states.append(block(states[-1], mask, rngs, sow_weights))
    return states

  def _embedding(self, config: EncoderConfig, rngs: nnx.Rngs) -> nnx.Module:
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(config.token_size, config.width, dtype=dtype, rngs=rngs)


def observed(
  model: Classifier, tokens: jax.Array, valid: jax.Array | None = None
) -> tuple[list[jax.Array], jax.Array]:
  """`Classifier.states`, and the plans, `[layers, batch, heads, length, length]`."""
  look = nnx.capture(
    lambda model: model.states(tokens, valid, sow_weights=True), nnx.Intermediate
  )
  states, sown = look(model)
  return states, jnp.stack(jax.tree.leaves(sown))


def loss_of_maps(model: nnx.Module) -> jax.Array | float:
  """What dual maps that learn in the loop add to the loss; zero without any."""
  learns = any(
    isinstance(module, asap_jax.AmortizedAttention)
    for _, module in nnx.iter_graph(model)
  )
  return asap_jax.dual_loss(model) if learns else 0.0


class Encoder(Classifier):
  """Tokens `[batch, length, token_size]` to class logits `[batch, classes]`."""

  def __call__(
    self,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """As `logits`."""
    return self.logits(tokens, valid, rngs)
