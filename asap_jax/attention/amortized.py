r"""Doubly stochastic attention without iterations from the first training step on.

A dual map stands in the loop: it predicts the query-side dual of the current queries
and keys, one closure follows, and nothing is left to compile. The map learns by itself,
on the dual objective of what it predicts; the model learns on its task, through closure
and prediction. Beyond the paper, which learns the map afterwards (Tran, Milkert and
Hyde, 2026, "ASAP", arXiv 2605.12879).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from asap_jax.attention.functions import check_heads
from asap_jax.attention.implementations.choice import (
  Implementation,
  PerPlatform,
  choose_for,
  gradient_for,
)
from asap_jax.attention.implementations.dispatch import ClosedPlan
from asap_jax.attention.implementations.iterated import iterated_duals
from asap_jax.attention.implementations.streamed import streamed_duals
from asap_jax.attention.inputs import Activation, Inputs
from asap_jax.attention.layers import AsapAttention, asked_for, check_no_decoding
from asap_jax.attention.signature import attention_fn
from asap_jax.c_transform.entropic import Duals, marginals
from asap_jax.dual_map.features import feature_count
from asap_jax.dual_map.predict import DualMap, Steps, predict_dual

# Of the Gaussian potential, whose weights are known before anything is learned.
FEATURES = ("query", "cumulants", "gaussian")


class DualLoss(nnx.Variable):
  """What the last call of an `AmortizedAttention` adds to the loss; never saved."""


class AmortizedAttention(AsapAttention):
  """An `AsapAttention` that trains with the model from the first step on.

  It begins at the Gaussian start (`asap_jax.gaussian_potential`), whose weights it goes
  on to learn. To `asap_jax.save` it is an `AsapAttention`. Inside of `jax.shard_map`
  each device has the loss of its own sequences.

  Args:
    heads: number of heads.
    dim: of a head.
    options: see `AsapAttention`.
    implementation: likewise; plans are formed for the gradient where they fit.

  Example:
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> AmortizedAttention(4, 8)(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """

  def __init__(
    self,
    heads: int,
    dim: int,
    options: dict[str, Any] | None = None,
    implementation: Implementation | None = None,
  ):
    super().__init__(gaussian_map(heads, dim), options, implementation)
    # Set by `model.eval()` and `model.train()`.
    self.deterministic = False
    self.dual_loss = DualLoss(jnp.zeros(()))

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    """As `AsapAttention`; in training it also leaves its share of the loss."""
    if self.deterministic:
      return super().__call__(query, key, value, *args, **kwargs)
    attend = functools.partial(_in_training, dual_map=self.dual_map)
    out, loss = attend(query, key, value, *args, **(self.bound | kwargs))
    self.dual_loss[...] = loss
    return out


class AmortizedMultiHeadAttention(nnx.MultiHeadAttention):
  """`nnx.MultiHeadAttention` that is doubly stochastic without iterations.

  Takes every argument of `nnx.MultiHeadAttention` but `attention_fn`, and is called
  like it; for padding pass `mask=nnx.make_attention_mask(valid, valid)`. Each layer
  holds an `AmortizedAttention`, whose map learns where `dual_loss(model)` is a part of
  the loss. Rows are exact, columns as good as the map.

  Args:
    num_heads: number of heads.
    in_features: features of the input.
    qkv_features: of queries, keys and values, all heads together; as of the input.
    *args: for `nnx.MultiHeadAttention`.
    epsilon: entropic regularisation; logits are divided by it.
    scale: of the logits, 1 / sqrt(head dimension) by default.
    max_segments: see `asap_jax.SinkhornMultiHeadAttention`.
    implementation: see `asap_jax.asap_attention`.
    decode: autoregressive decoding; only `False` is possible here.
    **kwargs: for `nnx.MultiHeadAttention`; `rngs` is needed.

  Raises:
    ValueError: if `decode` is true.

  Example:
    >>> layer = AmortizedMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    >>> def loss(layer, x):
    ...   return (layer(x) ** 2).mean() + dual_loss(layer)
    >>> gradients = nnx.jit(nnx.grad(loss))(layer, jnp.ones((1, 6, 8)))
    >>> of_map = nnx.filter_state(gradients, asap_jax.DualParam)
    >>> [leaf.shape for leaf in jax.tree.leaves(of_map)]  # directions, weights
    [(2, 1, 4), (2, 7)]
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    *args: Any,
    epsilon: float = 1.0,
    scale: float | None = None,
    max_segments: int | None = None,
    implementation: Implementation | None = None,
    decode: bool = False,
    **kwargs: Any,
  ):
    check_no_decoding(decode)
    options = {"epsilon": epsilon} | asked_for(scale=scale, max_segments=max_segments)
    dim = (qkv_features or in_features) // num_heads
    attention_fn = AmortizedAttention(num_heads, dim, options, implementation)
    super().__init__(
      num_heads,
      in_features,
      qkv_features,
      *args,
      attention_fn=attention_fn,
      decode=decode,
      **kwargs,
    )


def dual_loss(model: nnx.Module) -> jax.Array:
  r"""What the dual maps of a model descend on: minus the dual objective of each.

  To be added to the task's loss after the model was called, inside the function that is
  differentiated. For f predicted and g its c-transform it is
  $-\sum_i a_i f_i - \sum_j b_j g_j$, for every query, as a mean over batch and heads;
  its gradient reaches the maps alone, and the task's does not reach them.

  Args:
    model: that holds an `AmortizedAttention` in every place that was called, in
      training: after `model.eval()` the last losses stay.

  Returns:
    The sum over all layers, scanned ones included; in units of logits, of any sign.

  Raises:
    ValueError: if the model holds no `AmortizedAttention`.

  Example:
    >>> layer = AmortizedAttention(4, 8)
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> outputs = layer(tokens, tokens, tokens)
    >>> f"{dual_loss(layer):.2f}"
    '3.08'
  """
  losses = jax.tree.leaves(nnx.state(model, DualLoss))
  if not losses:
    raise ValueError("model holds no AmortizedAttention: expected at least one")
  return sum((jnp.sum(loss) for loss in losses), jnp.zeros(()))


def gaussian_map(heads: int, dim: int) -> DualMap:
  """The dual map that predicts the Gaussian potential of low rank.

  Example:
    >>> gaussian_map(2, 3).weights.shape
    (2, 6)
  """
  # f(x) = -x^T b - (x - a)^T V (x - a) / 2: the first cumulant and the square form.
  of_kinds = jnp.array([0.0] * dim + [-1.0, 0.0] + [-0.5])
  assert len(of_kinds) == feature_count(FEATURES, 1, dim)
  weights = jnp.broadcast_to(of_kinds, (heads, len(of_kinds)))
  return DualMap(jnp.ones((heads, 1, dim)), weights, FEATURES)


@attention_fn(is_pair=True, takes_segments=True, takes_masses=True)
def _in_training(
  inputs: Inputs,
  *,
  dual_map: DualMap,
  implementation: Implementation | None = None,
) -> tuple[Array, Array]:
  """One closure of a map that the task does not change, and the map's own loss."""
  check_heads(dual_map, inputs)
  chosen = choose_for(inputs, implementation, 1)
  gradient = gradient_for(inputs, implementation, chosen)
  fixed = jax.lax.stop_gradient(dual_map)
  f = inputs.by_segment(functools.partial(predict_dual, fixed))
  predicted = inputs.by_segment(
    lambda *tokens: predict_dual(dual_map, *jax.lax.stop_gradient(tokens))
  )
  steps = Steps(relaxation=None, momentum=None, side="query")
  closed = ClosedPlan(inputs, f, 1, steps, chosen, gradient=gradient)
  return inputs.attend(closed), objective_loss(inputs, predicted, chosen)


def objective_loss(
  inputs: Activation, f: Array, chosen: Implementation | PerPlatform
) -> Float[Array, ""]:
  """Minus the dual objective of f and its c-transform, a mean over all but queries."""
  fixed = jax.lax.stop_gradient(f)
  a, b = marginals(
    *inputs.masks, (*inputs.query.shape[:-1], inputs.key.shape[-2]), f.dtype
  )
  after, g = _closed(inputs, fixed, chosen)
  objective = (a * fixed).sum(-1) + (b * g).sum(-1)
  # The derivative in f: what its plan with g lacks of the rows' sums.
  lacking = a * (1.0 - jnp.exp(fixed - after))
  moving = (jax.lax.stop_gradient(lacking) * (f - fixed)).sum(-1)
  count = jnp.maximum(a.sum(-1), 1.0)
  return -((jax.lax.stop_gradient(objective) + moving) / count).mean()


def _closed(
  inputs: Activation, f: Array, chosen: Implementation | PerPlatform
) -> Duals:
  """Duals after one iteration from f, in the memory of the implementation."""
  if isinstance(chosen, PerPlatform):
    closed = {
      name: functools.partial(_closed, inputs, chosen=each)
      for name, each in chosen._asdict().items()
    }
    return jax.lax.platform_dependent(f, **closed)
  arguments = inputs.query, inputs.key, f, 1, *inputs.masks
  options: dict[str, Any] = {
    "segments": inputs.segments,
    "precision": inputs.precision,
  }
  if chosen == "xla" or inputs.bias is not None:
    return iterated_duals(*arguments, bias=inputs.bias, **options)
  return streamed_duals(*arguments, **options)
