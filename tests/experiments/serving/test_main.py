"""The serving experiment: its rival, and all of it on a few steps."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asap_jax import sinkhorn_attention
from asap_jax.compiler import measuring, selection
from experiments.serving import __main__ as serving
from experiments.serving.scaling import scaling_attention


@pytest.mark.parametrize("padded", [False, True])
def test_the_rival_runs_the_same_iterations(padded):
  random = np.random.default_rng(0)
  tokens = [jnp.asarray(random.normal(size=(2, 6, 2, 4)), jnp.float32) for _ in "qkv"]
  valid = jnp.arange(6) < jnp.asarray([[4], [6]])
  mask = nnx.make_attention_mask(valid, valid) if padded else None
  exact = functools.partial(sinkhorn_attention, implementation="ott")
  ours, theirs = (
    attend(*tokens, mask=mask, iterations=5) for attend in (scaling_attention, exact)
  )
  np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
def test_files_keep_the_accuracy(tmp_path, unchecked, monkeypatch):
  # What is chosen from takes long to compile, and so does a second layer.
  model = dataclasses.replace(serving.MODEL, layers=1)
  monkeypatch.setattr(serving, "MODEL", model)
  for module in (measuring, selection):
    monkeypatch.setattr(module, "CUTS", (1,))
  monkeypatch.setattr(selection, "STARTS", ())
  for module in ("jax2onnx", "onnxruntime"):
    pytest.importorskip(module, reason="of the extra `onnx`")
  out = tmp_path / "out"
  rows = serving.run(out, 0, steps=8, threads=1, repeats=3, refine_steps=0)
  assert json.loads((out / "results.json").read_text())["rows"] == rows
  assert {(row["model"], row["method"]) for row in rows} == {
    (model, method)
    for model in ("digits", "padded digits")
    for method in ("sinkhorn@20", "scaling@20", "best", "asap", "softmax_swap")
  }
  for row in rows:
    assert row["onnx_difference"] < 1e-4
    assert row["jax_difference"] < 1e-4
    assert row["onnx_bytes"] > 10_000 < row["stablehlo_bytes"]
