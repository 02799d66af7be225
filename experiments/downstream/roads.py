"""Roads from softmax attention to Sinkhorn attention, before and during fine-tuning."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import asap_jax
from asap_jax import sinkhorn_attention, softmax_attention
from experiments.common.train import LOG_EVERY, TrainConfig, Watch, transformation
from experiments.datasets.loaders import Batch
from experiments.encoders import BertEncoder
from experiments.encoders.bert import mean_of_valid

# What stands before fine-tuning: weights as they are, projections refitted, or all
# blocks trained to give softmax's states; or what moves in the first half of it:
# all layers from softmax to Sinkhorn together, or one after the other at once.
ROADS = ("switch", "refit", "distil", "mixed", "layers")
# Of fine-tuning, after which attention is doubly stochastic.
_MOVING = 0.5
# The highest of distillation.
_RATE = 5e-4


class _Share(nnx.Variable):
  """Share of Sinkhorn attention in a mixture."""


class MixedAttention(nnx.Module):
  """Softmax attention that becomes Sinkhorn attention while it is trained.

  Args:
    options: of Sinkhorn attention.
    begins: share of training at which it begins to move.
    ends: where it is Sinkhorn attention alone, as it is outside of training.
  """

  def __init__(self, options: Mapping[str, Any], begins: float, ends: float):
    self._sinkhorn = functools.partial(sinkhorn_attention, **options)
    self._begins, self._ends = begins, ends
    self._share = _Share(jnp.ones(()))

  def advance(self, progress: jax.Array | float) -> None:
    """Moves to a share of training, from 0 to 1."""
    moved = (progress - self._begins) / (self._ends - self._begins)
    self._share[...] = jnp.clip(moved, 0.0, 1.0)

  def __call__(self, query, key, value, *, mask=None, **options) -> jax.Array:
    """As `asap_jax.sinkhorn_attention`, whose plan is what is kept of plans."""
    new = self._sinkhorn(query, key, value, mask=mask, **options)
    share = self._share[...]
    return share * new + (1 - share) * softmax_attention(query, key, value, mask=mask)


def advance(model: nnx.Module, progress: jax.Array | float) -> None:
  """Moves all mixed attentions of a model, in place."""
  for _, module in nnx.iter_modules(model):
    if isinstance(module, MixedAttention):
      module.advance(progress)


def convert(
  softmax: BertEncoder,
  road: str,
  bound: Mapping[str, Any] | None,
  batches: Sequence[Batch],
) -> BertEncoder:
  """A copy with doubly stochastic attention, at the beginning of a road.

  Args:
    softmax: left untouched.
    road: one of `ROADS`, of which `distil` begins as `refit` does.
    bound: arguments of Sinkhorn attention; `None` for a dual map that learns with the
      model.
    batches: unlabelled, to refit on.
  """
  given = bound or {}
  own = {name: given[name] for name in ("iterations", "start") if name in given}
  if road in ("mixed", "layers"):
    encoder = nnx.clone(softmax)
    count = len(encoder.blocks)
    for layer, block in enumerate(encoder.blocks):
      begins = 0.0 if road == "mixed" else _MOVING * layer / count
      ends = _MOVING if road == "mixed" else begins + 1e-6
      attention = MixedAttention(own, begins, ends)
      block.attention.attention_fn = nnx.data(attention)
    return encoder
  converted, report = asap_jax.to_sinkhorn(
    softmax,
    amortized=bound is None,
    refit=road != "switch",
    batches=batches,
    call=lambda model, batch: model(batch["ids"], batch["valid"]),
    **own,
  )
  print(report)
  assert isinstance(converted, BertEncoder)
  return converted


def distil(
  encoder: BertEncoder,
  softmax: BertEncoder,
  batches: Iterator[Batch],
  config: TrainConfig,
  label: str,
) -> BertEncoder:
  """A copy that gives softmax's states and embeddings, as far as some steps lead.

  The loss is the mean over layers of the squared distance of the states, relative to
  their square, and one less the cosine of the embeddings. No label is read.
  """
  graph, *states = nnx.split(encoder, nnx.Param, ...)
  params, rest = states
  known = nnx.split(softmax)
  own = transformation(config)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, optimizer, known, batch):
    valid = batch["valid"]
    wanted = nnx.merge(*known).states(batch["ids"], valid)[1:]

    def loss_fn(params):
      model = nnx.merge(graph, params, rest, copy=True)
      return distance(model.states(batch["ids"], valid)[1:], wanted, valid)

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    updates, optimizer = own.update(gradients, optimizer, params)
    return optax.apply_updates(params, updates), optimizer, loss

  params = jax.tree.map(jnp.copy, params)
  optimizer = own.init(params)
  with Watch(label, config, 0) as watch:
    for taken in range(1, config.steps + 1):
      batch = {name: part for name, part in next(batches).items() if name != "label"}
      params, optimizer, loss = step(params, optimizer, known, batch)
      if taken % LOG_EVERY == 0 or taken == config.steps:
        watch.read(taken, loss, jnp.full((), jnp.nan))
  return nnx.merge(graph, params, rest)


def distance(
  states: Sequence[jax.Array], wanted: Sequence[jax.Array], valid: jax.Array
) -> jax.Array:
  """The loss of `distil`, of the states after all layers."""
  square = lambda x: jnp.where(valid[..., None], x**2, 0.0).sum()  # noqa: E731
  apart = [
    square(state - other) / square(other)
    for state, other in zip(states, wanted, strict=True)
  ]
  embedded = [mean_of_valid(each[-1], valid) for each in (states, wanted)]
  cosine = optax.cosine_similarity(*embedded)
  return sum(apart) / len(apart) + (1 - cosine).mean()


def distilling(steps: int, batch_size: int) -> TrainConfig:
  """How `distil` trains."""
  return TrainConfig(steps, batch_size, learning_rate=_RATE, weight_decay=0.0)
