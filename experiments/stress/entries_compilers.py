"""Compiling and saving, arguments that each takes, and bad values of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import asap_jax
from experiments.stress.samples import (
  DIM,
  HEADS,
  NAN,
  TOKENS,
  Entry,
  compiled,
  teacher,
)


def compilers() -> dict[str, Entry]:
  shape = 3, 2, 6, HEADS * DIM
  batches = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  model = {"model": teacher(), "batches": batches, "progress": False}
  call = asap_jax.AttentionCall(TOKENS, TOKENS)
  common: dict[str, list[Any]] = {
    "operator": ["asap", 3],
    "target_tv": [-0.1, 2.0, NAN],
  }
  attention = linen.MultiHeadDotProductAttention
  module = attention(HEADS, attention_fn=asap_jax.sinkhorn_attention)
  # Whatever the attention is, its parameters are the same.
  variables = attention(HEADS).init(jax.random.key(0), batches[0])
  plain = asap_jax.Recipe(slices=1, refine_steps=0)
  with_recipe = functools.partial(_with_recipe, batches)
  return {
    "compile": Entry(
      asap_jax.compile,
      model,
      {
        **common,
        "model": [nnx.Linear(2, 2, rngs=nnx.Rngs(0)), compiled(), module, None],
        "batches": [[], batches[:1], ["text", "text"]],
        "leave": [["nothing"]],
      },
    ),
    "choose": Entry(asap_jax.choose, model, {"model": [teacher(), compiled()]}),
    "compile_linen": Entry(
      asap_jax.compile_linen,
      {"module": module, "variables": variables, "batches": batches, "progress": False},
      {**common, "module": [teacher(), None], "batches": [[], batches[:1]]},
    ),
    "fit": Entry(
      asap_jax.fit,
      {"batches": [call, call], "progress": False},
      {
        **common,
        "batches": [[], [call], [TOKENS, TOKENS]],
        "iterations": [0, -1],
        "start": ["one"],
        "relaxation": [2.0],
        "tolerance": [0.0],
        "epsilon": [0.0, NAN],
        "implementation": ["flash"],
      },
    ),
    "distil": Entry(
      asap_jax.distil,
      {**model, "model": compiled(), "teacher": teacher(), "steps": 1},
      {
        "model": [teacher()],
        "steps": [0, -1],
        "check_every": [0],
        "learning_rate": [0.0, NAN],
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
        "ridge": [-1.0, NAN],
        "refine_steps": [-1],
        "objective": ["none"],
      },
    ),
    "save": Entry(
      asap_jax.save,
      {"path": "/nowhere", "model": compiled()},
      {
        "path": ["gs://bucket/model", "s3://bucket/model"],
        "model": [teacher(), nnx.eval_shape(compiled), None, {}],
      },
    ),
    "load": Entry(
      asap_jax.load,
      {"path": "/nowhere", "model": teacher()},
      {"path": ["gs://bucket/model"], "model": [compiled(), None, {}]},
    ),
    **_observers(batches),
    **_files(batches[0], module),
  }


def _observers(batches: jax.Array) -> dict[str, Entry]:
  linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  softmax = nnx.MultiHeadAttention(HEADS, HEADS * DIM, decode=False, rngs=nnx.Rngs(0))
  return {
    "to_sinkhorn": Entry(
      asap_jax.to_sinkhorn,
      {"model": softmax},
      {
        "model": [linear, compiled(), None],
        "iterations": [-1],
        "start": ["one"],
        "names": [["nothing"]],
        "leave": [["nothing"]],
        "refit": [True],
      },
    ),
    "monitor": Entry(
      asap_jax.monitor,
      {"model": compiled(), "batches": batches},
      {"model": [linear, None], "batches": [[]], "margin": [0.5, NAN]},
    ),
    "watch": Entry(asap_jax.watch, {}, {"model": [compiled(), linear, None]}),
    "diagnose": Entry(
      asap_jax.diagnose,
      {"model": compiled(), "batches": batches},
      {"model": [linear, None], "batches": [[]]},
    ),
  }


def _files(example: jax.Array, module: linen.Module) -> dict[str, Entry]:
  good = {"model": compiled(), "example_inputs": example}
  models = {"model": [module, None]}
  return {
    "export": Entry(
      asap_jax.export,
      good,
      {
        **models,
        "platforms": ["cpu", (), ("abacus",)],
        "example_inputs": ["text", (example, "text")],
      },
    ),
    "export_onnx": Entry(
      asap_jax.export_onnx,
      good,
      {
        **models,
        "opset": [5, 99],
        "example_inputs": ["text"],
        "symbolic": ["b, n, ..."],
      },
    ),
  }


def _with_recipe(batches: jax.Array, recipe: asap_jax.Recipe, **field: Any) -> None:
  """Compiles by a recipe, for it is looked at there."""
  own = dataclasses.replace(recipe, **field)
  asap_jax.compile(teacher(), batches, own, progress=False)
