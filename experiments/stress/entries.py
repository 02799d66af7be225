"""Public entries, arguments that each takes, and bad values of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

import asap_jax
from asap_jax import peers

_HEADS, _DIM = 2, 4
_TOKENS = jnp.ones((2, 6, _HEADS, _DIM))
_CLOUD = jnp.ones((3, 6, _DIM))
_LOGITS = jnp.ones((2, 6, 5))
_NAN = float("nan")


class Entry(NamedTuple):
  """A public function or class, arguments that it takes, and bad values of each."""

  call: Callable[..., Any]
  good: Mapping[str, Any]
  bad: Mapping[str, list[Any]]


def dual_map(**fields: Any) -> asap_jax.DualMap:
  plain: dict[str, Any] = {
    "directions": jnp.ones((_HEADS, 2, _DIM)),
    "weights": jnp.ones((_HEADS, 2)),
    "features": ("potentials",),
  }
  return asap_jax.DualMap(**plain | fields)


def _teacher() -> nnx.Module:
  return asap_jax.SinkhornMultiHeadAttention(
    _HEADS, _HEADS * _DIM, iterations=3, rngs=nnx.Rngs(0)
  )


def _compiled() -> nnx.Module:
  model: Any = _teacher()
  model.attention_fn = nnx.data(asap_jax.AsapAttention(dual_map()))
  return model


def entries() -> dict[str, Entry]:
  """By name; whatever is public and can be called with bad arguments is here."""
  return {**_functions(), **_layers(), **_pure(), **_compilers(), **_peers()}


def _attention(**more: list[Any]) -> dict[str, list[Any]]:
  """Bad arguments of any attention function."""
  return {
    "query": [_TOKENS[0, 0], _TOKENS[..., :3], jnp.ones((3, 6, _HEADS, _DIM))],
    "key": [_TOKENS[:, :, :0], jnp.ones((2, 6, 3, _DIM)), _TOKENS[0]],
    "value": [_TOKENS[:, :5], _TOKENS[:1], _TOKENS[0, 0]],
    "bias": [jnp.ones((2, 2, 6, 7)), jnp.ones((3, 1, 6, 6))],
    "mask": [
      jnp.ones((2, 1, 6, 7), bool),
      jnp.ones((2, 5, 6, 6), bool),
      jnp.where(jnp.eye(6, dtype=bool), 0.0, -jnp.inf)[None, None],
    ],
    "dropout_rate": [-0.5, 1.5, _NAN],
    "epsilon": [0.0, -1.0, _NAN],
    "einsum_dot_general": [jnp.einsum],
    **more,
  }


def _functions() -> dict[str, Entry]:
  tokens = {"query": _TOKENS, "key": _TOKENS, "value": _TOKENS}
  segments = [jnp.ones((2, 5), int), jnp.ones((2, 6)), jnp.ones((3, 6), int)]
  doubly = _attention(
    is_causal=[True],
    implementation=["flash", ""],
    segment_ids=segments,
    max_segments=[0, -1],
  )
  # Which has a meaning only where masks are of segments.
  masked = {**tokens, "mask": jnp.ones((2, 1, 6, 6), bool)}
  return {
    "softmax_attention": Entry(
      asap_jax.softmax_attention, tokens, _attention(segment_ids=segments)
    ),
    "sinkhorn_attention": Entry(
      asap_jax.sinkhorn_attention,
      tokens,
      doubly
      | {
        "iterations": [0, -1],
        "start": ["one", None],
        "relaxation": [0.5, 2.0, _NAN],
        "tolerance": [0.0, -1.0, _NAN, 1],
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
          dual_map(directions=jnp.ones((3, 2, _DIM)), weights=jnp.ones((3, 2))),
          dual_map(weights=jnp.ones((_HEADS, 3))),
          dual_map(directions=jnp.ones((_HEADS, 2, 3))),
        ],
      },
    ),
  }


def _layers() -> dict[str, Entry]:
  good = {"num_heads": _HEADS, "in_features": 8, "rngs": nnx.Rngs(0)}
  attend = {"query": _TOKENS, "key": _TOKENS, "value": _TOKENS}
  return {
    "SinkhornMultiHeadAttention": Entry(
      asap_jax.SinkhornMultiHeadAttention,
      good,
      {
        "iterations": [0, -3],
        "start": ["one"],
        "tolerance": [0.0, _NAN],
        "decode": [True],
      },
    ),
    "AmortizedMultiHeadAttention": Entry(
      asap_jax.AmortizedMultiHeadAttention, good, {"decode": [True]}
    ),
    "AsapAttention": Entry(
      asap_jax.AsapAttention(dual_map()), attend, {"query": [_TOKENS[..., :3]]}
    ),
    "AmortizedAttention": Entry(
      asap_jax.AmortizedAttention(_HEADS, _DIM), attend, {"query": [_TOKENS[..., :3]]}
    ),
    "dual_loss": Entry(asap_jax.dual_loss, {}, {"model": [nnx.Dict()]}),
  }


def _pure() -> dict[str, Entry]:
  weights = [jnp.ones((3, 5)), jnp.ones((3, 6), int)]
  clouds = {"query": _CLOUD, "key": _CLOUD}
  shapes = {"query": [_CLOUD[..., :3], _CLOUD[0, 0]], "key": [_CLOUD[..., :3]]}
  of_clouds = {**shapes, "query_weights": weights, "key_weights": weights}
  f, g = jnp.ones((2, 6)), jnp.ones((2, 5))
  of_logits = {
    "query_weights": [jnp.ones((2, 5)), jnp.ones((2, 6), int)],
    "key_weights": [jnp.ones((2, 6)), jnp.ones((2, 5), int)],
  }
  duals = {"duals": [asap_jax.Duals(g, g), asap_jax.Duals(f, f)]}
  x = {"x": jnp.ones((3, 6)), "y": jnp.ones((3, 5))}
  return {
    "gaussian_potential": Entry(
      asap_jax.gaussian_potential,
      clouds,
      {**of_clouds, "covariances": ["none"], "rank": [0], "side": ["both"]},
    ),
    "GaussianDualInitializer": Entry(
      asap_jax.GaussianDualInitializer, {}, {"covariances": ["none"], "rank": [0]}
    ),
    "SlicedDualInitializer": Entry(
      asap_jax.SlicedDualInitializer,
      {},
      {"dual_map": [dual_map()], "slices": ["none"]},
    ),
    "kantorovich_potentials": Entry(
      asap_jax.kantorovich_potentials,
      x,
      {
        "x": [jnp.ones(()), jnp.ones((2, 6))],
        "x_weights": [jnp.ones((3, 5)), jnp.ones((3, 6), int)],
        "y_weights": [jnp.ones((3, 6))],
        "cost": ["cubic"],
      },
    ),
    "sliced_potentials": Entry(
      asap_jax.sliced_potentials,
      {**clouds, "directions": jnp.ones((2, _DIM))},
      {**of_clouds, "directions": [jnp.ones((2, 3))]},
    ),
    "predict_dual": Entry(
      asap_jax.predict_dual,
      {
        "dual_map": dual_map(),
        "query": jnp.ones((2, 6, _DIM)),
        "key": jnp.ones((2, 6, _DIM)),
      },
      {
        "dual_map": [dual_map(weights=jnp.ones((_HEADS, 3)))],
        "query_weights": [jnp.ones((2, 5))],
      },
    ),
    "DualMap": Entry(
      lambda **fields: asap_jax.predict_dual(
        dual_map(**fields), jnp.ones((2, 6, _DIM)), jnp.ones((2, 6, _DIM))
      ),
      {},
      {"features": [("unknown",), ("query", "potentials")]},
    ),
    "closure": Entry(
      asap_jax.closure, {"logits": _LOGITS, "f": f}, {"f": [g], **of_logits}
    ),
    "closures": Entry(
      asap_jax.closures,
      {"logits": _LOGITS, "dual": f, "count": 2},
      {
        "dual": [g],
        "count": [0, -1],
        "relaxation": [jnp.ones((2, 3))],
        "momentum": [jnp.ones((2, 3))],
        "side": ["both"],
        **of_logits,
      },
    ),
    "plan": Entry(
      asap_jax.plan,
      {"logits": _LOGITS, "duals": asap_jax.Duals(f, g)},
      {**duals, **of_logits},
    ),
    "sinkhorn_duals": Entry(
      asap_jax.sinkhorn_duals,
      {"logits": _LOGITS, "iterations": 2},
      {"iterations": [0, -1], "init": [g], **of_logits},
    ),
  }


def _compilers() -> dict[str, Entry]:
  batches = jax.random.normal(jax.random.key(0), (3, 2, 6, _HEADS * _DIM))
  model = {"model": _teacher(), "batches": batches, "progress": False}
  call = asap_jax.AttentionCall(_TOKENS, _TOKENS)
  common: dict[str, list[Any]] = {
    "operator": ["asap", 3],
    "target_tv": [-0.1, 2.0, _NAN],
  }
  module = linen.MultiHeadDotProductAttention(
    _HEADS, attention_fn=asap_jax.sinkhorn_attention
  )
  variables = module.init(jax.random.key(0), batches[0])
  plain = asap_jax.Recipe(slices=1, refine_steps=0)
  with_recipe = functools.partial(_with_recipe, batches)
  return {
    "compile": Entry(
      asap_jax.compile,
      model,
      {
        **common,
        "model": [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), _compiled(), module, None],
        "batches": [[], batches[:1], ["text", "text"]],
        "leave": [["nothing"]],
      },
    ),
    "choose": Entry(asap_jax.choose, model, {"model": [_teacher(), _compiled()]}),
    "compile_linen": Entry(
      asap_jax.compile_linen,
      {"module": module, "variables": variables, "batches": batches, "progress": False},
      {**common, "module": [_teacher(), None], "batches": [[], batches[:1]]},
    ),
    "fit": Entry(
      asap_jax.fit,
      {"batches": [call, call], "progress": False},
      {
        **common,
        "batches": [[], [call], [_TOKENS, _TOKENS]],
        "iterations": [0, -1],
        "start": ["one"],
        "relaxation": [2.0],
        "tolerance": [0.0],
        "epsilon": [0.0, _NAN],
        "implementation": ["flash"],
      },
    ),
    "distil": Entry(
      asap_jax.distil,
      {**model, "model": _compiled(), "teacher": _teacher(), "steps": 1},
      {
        "model": [_teacher()],
        "steps": [0, -1],
        "check_every": [0],
        "learning_rate": [0.0, _NAN],
        "batches": [[]],
      },
    ),
    "Recipe": Entry(
      with_recipe,
      {"recipe": plain},
      {
        "slices": [0, -1],
        "closures": [0],
        "directions": ["none"],
        "features": [("none",), ()],
        "hidden": [-1, 1],
        "ridge": [-1.0, _NAN],
        "refine_steps": [-1],
        "objective": ["none"],
      },
    ),
    "save": Entry(
      asap_jax.save,
      {"path": "/nowhere", "model": _compiled()},
      {
        "path": ["gs://bucket/model", "s3://bucket/model"],
        "model": [_teacher(), nnx.eval_shape(_compiled), None, {}],
      },
    ),
    "load": Entry(
      asap_jax.load,
      {"path": "/nowhere", "model": _teacher()},
      {"path": ["gs://bucket/model"], "model": [_compiled(), None, {}]},
    ),
  }


def _with_recipe(batches: jax.Array, recipe: asap_jax.Recipe, **field: Any) -> None:
  """Compiles by a recipe, for it is looked at there."""
  own = dataclasses.replace(recipe, **field)
  asap_jax.compile(_teacher(), batches, own, progress=False)


def _peers() -> dict[str, Entry]:
  tokens = {"query": _TOKENS, "key": _TOKENS, "value": _TOKENS}
  bad = {
    "query": [_TOKENS[0, 0], jnp.ones((3, 6, _HEADS, _DIM))],
    "value": [_TOKENS[:, :5]],
  }
  return {
    "peers.attention_named": Entry(peers.attention_named, {}, {"name": ["nothing"]}),
    **{
      f"peers.{name}": Entry(getattr(peers, name), tokens, bad)
      for name in ("esp_attention", "kernel_sinkhorn_attention", "sinkformer_attention")
    },
  }
