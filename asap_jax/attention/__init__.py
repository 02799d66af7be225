"""Attention functions under the one signature of Flax's layers, and the layers.

`functions` has softmax, Sinkhorn and compiled attention; `inputs` lays out their
arguments, `masks` takes masks and packed sequences apart, `signature` turns a short
core into a function that Flax can call, `layers` are the NNX modules, `amortized` those
whose map learns with the model, `watched` shows how exact columns are,
`implementations` are the ways to compute the closures,
and `sequence_sharded` is the one for sequences that are spread over devices.
"""

from asap_jax.attention.amortized import (
  AmortizedAttention,
  AmortizedMultiHeadAttention,
  dual_loss,
)
from asap_jax.attention.functions import (
  asap_attention,
  sinkhorn_attention,
  softmax_attention,
)
from asap_jax.attention.layers import (
  AsapAttention,
  DualParam,
  SinkhornMultiHeadAttention,
)
from asap_jax.attention.sequence_sharded import sequence_sharded_attention
from asap_jax.attention.signature import AttentionFn
from asap_jax.attention.watched import WatchedAttention

__all__ = [
  "AmortizedAttention",
  "AmortizedMultiHeadAttention",
  "AsapAttention",
  "AttentionFn",
  "DualParam",
  "SinkhornMultiHeadAttention",
  "WatchedAttention",
  "asap_attention",
  "dual_loss",
  "sequence_sharded_attention",
  "sinkhorn_attention",
  "softmax_attention",
]
