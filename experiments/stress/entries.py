"""Public entries, arguments that each takes, and bad values of them."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

import asap_jax
from asap_jax import matching, peers
from experiments.stress.entries_compilers import compilers
from experiments.stress.entries_pure import pure
from experiments.stress.samples import DIM, HEADS, NAN, TOKENS, Entry, dual_map


def entries() -> dict[str, Entry]:
  """By name; whatever is public and can be called with bad arguments is here."""
  return {
    **_functions(),
    **_layers(),
    **pure(),
    **compilers(),
    **_peers(),
    **_matching(),
  }


def _attention(**more: list[Any]) -> dict[str, list[Any]]:
  """Bad arguments of any attention function."""
  return {
    "query": [TOKENS[0, 0], TOKENS[..., :3], jnp.ones((3, 6, HEADS, DIM))],
    "key": [TOKENS[:, :, :0], jnp.ones((2, 6, 3, DIM)), TOKENS[0]],
    "value": [TOKENS[:, :5], TOKENS[:1], TOKENS[0, 0]],
    "bias": [jnp.ones((2, 2, 6, 7)), jnp.ones((3, 1, 6, 6))],
    "mask": [
      jnp.ones((2, 1, 6, 7), bool),
      jnp.ones((2, 5, 6, 6), bool),
      jnp.where(jnp.eye(6, dtype=bool), 0.0, -jnp.inf)[None, None],
    ],
    "dropout_rate": [-0.5, 1.5, NAN],
    "epsilon": [0.0, -1.0, NAN],
    "einsum_dot_general": [jnp.einsum],
    **more,
  }


def _functions() -> dict[str, Entry]:
  tokens = {"query": TOKENS, "key": TOKENS, "value": TOKENS}
  segments = [jnp.ones((2, 5), int), jnp.ones((2, 6)), jnp.ones((3, 6), int)]
  masses = [jnp.ones((2, 5)), jnp.ones((2, 6), int), -jnp.ones((2, 6))]
  of_masses = {"query_weights": masses, "key_weights": masses}
  doubly = _attention(
    is_causal=[True],
    implementation=["flash", ""],
    segment_ids=segments,
    max_segments=[0, -1],
    **of_masses,
  )
  # Which has a meaning only where masks are of segments.
  masked = {**tokens, "mask": jnp.ones((2, 1, 6, 6), bool)}
  return {
    "softmax_attention": Entry(
      asap_jax.softmax_attention,
      tokens,
      _attention(segment_ids=segments, **of_masses),
    ),
    "sinkhorn_attention": Entry(
      asap_jax.sinkhorn_attention,
      tokens,
      doubly
      | {
        "iterations": [0, -1],
        "start": ["one", None],
        "relaxation": [0.5, 2.0, NAN],
        "tolerance": [0.0, -1.0, NAN, 1],
        "max_segments": [],
      },
    ),
    "sinkhorn_attention, masked": Entry(
      asap_jax.sinkhorn_attention, masked, {"max_segments": [0, -1]}
    ),
    "asap_attention": Entry(
      asap_jax.asap_attention,
      {**tokens, "dual_map": dual_map()},
      doubly
      | {
        "max_segments": [],
        "dual_map": [
          dual_map(directions=jnp.ones((3, 2, DIM)), weights=jnp.ones((3, 2))),
          dual_map(weights=jnp.ones((HEADS, 3))),
          dual_map(directions=jnp.ones((HEADS, 2, 3))),
        ],
      },
    ),
  }


def _layers() -> dict[str, Entry]:
  good = {"num_heads": HEADS, "in_features": 8, "rngs": nnx.Rngs(0)}
  attend = {"query": TOKENS, "key": TOKENS, "value": TOKENS}
  return {
    "SinkhornMultiHeadAttention": Entry(
      asap_jax.SinkhornMultiHeadAttention,
      good,
      {
        "iterations": [0, -3],
        "start": ["one"],
        "tolerance": [0.0, NAN],
        "decode": [True],
      },
    ),
    "AmortizedMultiHeadAttention": Entry(
      asap_jax.AmortizedMultiHeadAttention, good, {"decode": [True]}
    ),
    "AsapAttention": Entry(
      asap_jax.AsapAttention(dual_map()), attend, {"query": [TOKENS[..., :3]]}
    ),
    "AmortizedAttention": Entry(
      asap_jax.AmortizedAttention(HEADS, DIM), attend, {"query": [TOKENS[..., :3]]}
    ),
    "dual_loss": Entry(asap_jax.dual_loss, {}, {"model": [nnx.Dict()]}),
  }


def _peers() -> dict[str, Entry]:
  tokens = {"query": TOKENS, "key": TOKENS, "value": TOKENS}
  bad = {
    "query": [TOKENS[0, 0], jnp.ones((3, 6, HEADS, DIM))],
    "value": [TOKENS[:, :5]],
  }
  return {
    "peers.attention_named": Entry(peers.attention_named, {}, {"name": ["nothing"]}),
    **{
      f"peers.{name}": Entry(getattr(peers, name), tokens, bad)
      for name in ("esp_attention", "kernel_sinkhorn_attention", "sinkformer_attention")
    },
  }


def _matching() -> dict[str, Entry]:
  pair = {"query": jnp.ones((2, 6, DIM)), "key": jnp.ones((2, 5, DIM))}
  bad: dict[str, list[Any]] = {
    "query": [jnp.ones((3, 6, DIM)), jnp.ones((2, 6, 3)), jnp.ones(DIM)],
    "key": [jnp.ones((2, 0, DIM))],
    "query_mask": [jnp.ones((2, 5), bool), jnp.ones((2, 6))],
    "key_mask": [jnp.ones((2, 6), bool)],
    "temperature": [0.0, -1.0, NAN],
  }
  exact: dict[str, list[Any]] = {
    "iterations": [0, -1],
    "start": ["one", None],
    "implementation": ["cudnn"],
  }
  own: dict[str, list[Any]] = {
    "temperature": [0.0, NAN],
    "iterations": [0],
    "start": ["one"],
  }
  return {
    "matching.sinkhorn_matching": Entry(
      matching.sinkhorn_matching, pair, {**bad, **exact}
    ),
    "matching.asap_matching": Entry(
      matching.asap_matching,
      {**pair, "operator": asap_jax.compiler.Sinkhorn(1)},
      {**bad, "operator": [asap_jax.compiler.operators.Asap(dual_map())]},
    ),
    "matching.matches": Entry(
      matching.matches,
      {"log_plan": jnp.zeros((3, 3))},
      {"log_plan": [jnp.zeros(3), jnp.zeros((1, 3))], "threshold": [-0.1, 1.0, NAN]},
    ),
    "matching.OptimalMatching": Entry(matching.OptimalMatching, {}, own),
  }
