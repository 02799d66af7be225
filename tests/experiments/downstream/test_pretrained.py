"""Classifiers that begin at a pretrained encoder."""

import argparse
import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra `pretrained`")
from flax import nnx
from helpers.encoder_directory import CONFIG, write
from helpers.small_training import PRESET, task

import asap_jax
from experiments.common import replacements
from experiments.downstream import __main__ as downstream
from experiments.downstream import data as sources
from experiments.downstream import evaluation, seeds
from experiments.downstream.pretrained import Frozen, Pretrained
from experiments.encoders import load_encoder

SMALL = dataclasses.replace(PRESET, teacher="sinkhorn@2", length=6)


def batch():
  random = np.random.default_rng(0)
  valid = np.arange(6) < random.integers(2, 7, size=(16, 1))
  return {"ids": random.integers(4, 20, size=valid.shape), "valid": valid}


def data_of(begun):
  return sources.load(task(), SMALL, None, None, begun.coder(SMALL))


def test_softmax_begins_at_the_pretrained_embeddings(tmp_path):
  begun = Pretrained.named(str(write(tmp_path)), SMALL, 0)
  model = begun.build("softmax", SMALL, data_of(begun), 0)
  given = batch()
  expected = load_encoder(tmp_path)(given["ids"], given["valid"])
  found = model.encoder(given["ids"], given["valid"])
  np.testing.assert_array_equal(found, expected)
  assert model(given).shape == (16, 3)


def test_the_teacher_is_softmax_converted_and_refitted(tmp_path):
  begun = Pretrained.named(str(write(tmp_path)), SMALL, 1)
  softmax, teacher = (
    begun.build(name, SMALL, data_of(begun), 0) for name in ("softmax", "sinkhorn")
  )
  for trained, refitted in zip(
    softmax.encoder.blocks, teacher.encoder.blocks, strict=True
  ):
    function = refitted.attention.attention_fn
    assert function.func is asap_jax.sinkhorn_attention
    assert function.keywords["iterations"] == 2
    before, after = (each.attention.out.kernel[...] for each in (trained, refitted))
    assert bool((before != after).any())
    same = (each.attention.query.kernel[...] for each in (trained, refitted))
    np.testing.assert_array_equal(*same)


def test_what_is_frozen_is_no_parameter(tmp_path):
  begun = Pretrained.named(str(write(tmp_path)), SMALL, 1)
  model = begun.build("softmax", SMALL, data_of(begun), 0)
  trained = {path[:3] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
  assert ("encoder", "blocks", 1) in trained
  assert ("encoder", "blocks", 0) not in trained
  assert {path[0] for path in trained} == {"encoder", "norm", "head"}
  assert {path[1] for path in trained if path[0] == "encoder"} == {"blocks"}
  frozen = jax.tree.leaves(nnx.state(model, Frozen))
  assert sum(leaf.size for leaf in frozen) > CONFIG["vocab_size"] * 8


@pytest.mark.parametrize(
  ("change", "preset", "frozen", "words"),
  [
    ({}, {"length": 17}, 0, "has 16 positions: expected at least 17"),
    ({}, {}, 3, "frozen_layers=3: expected at most the 2"),
  ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, preset, frozen, words):
  directory = write(tmp_path, config=CONFIG | change)
  with pytest.raises(ValueError, match=words):
    Pretrained.named(str(directory), dataclasses.replace(SMALL, **preset), frozen)


def compile_double(teacher, batches, operator, *, seed):
  """In the place of `asap_jax.compile`: Sinkhorn cut to one iteration."""
  assert all(batch.keys() == {"ids", "valid"} for batch in batches)
  seconds = argparse.Namespace(seconds=1, layers=[argparse.Namespace(chosen="one")])
  return replacements.cut_sinkhorn(teacher, 1), seconds


def call(out, *options):
  arguments = ["--dataset", "news", "--out", out, "--slices", 2, *options]
  downstream.main([str(argument) for argument in arguments])


@pytest.fixture
def small(monkeypatch):
  for module in (downstream, sources):
    monkeypatch.setattr(module, "load_task", lambda name, **_: task(name))
  monkeypatch.setattr(downstream, "preset_of", lambda *_: SMALL)
  monkeypatch.setattr(seeds, "REPEATS", 3)
  monkeypatch.setattr(sources, "BATCH", 16)
  for name, value in (("CUTS", (1,)), ("COMPILED_PRETRAINED", ("asap",))):
    monkeypatch.setattr(evaluation, name, value)


@pytest.mark.slow
def test_the_command_fine_tunes_compiles_and_evaluates(tmp_path, small, monkeypatch):
  monkeypatch.setattr(asap_jax, "compile", compile_double)
  out = tmp_path / "out"
  options = ("--seeds", 0, "--test-limit", 32, "--frozen-layers", 1)
  call(out, "--init", write(tmp_path / "tiny"), "--learning-rate", 1e-3, *options)
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  expected = ["softmax", "sinkhorn", "softmax_swap", "sinkhorn@1", "asap", "linear"]
  assert list(rows) == expected
  assert rows["asap"]["tv"] < rows["softmax_swap"]["tv"]
  assert results["config"]["preset_values"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (("--init", "nowhere"), "argument --init: 'nowhere' is no directory"),
    (("--frozen-layers", 1), "argument --frozen-layers: needs --init"),
    (("--init", "minilm", "--preset", "tiny"), "argument --preset: of models from"),
    (("--learning-rate", "0"), "'0': expected a number above zero"),
  ],
)
def test_options_that_make_no_sense(tmp_path, small, capsys, options, words):
  with pytest.raises(SystemExit):
    call(tmp_path / "out", *options)
  assert words in " ".join(capsys.readouterr().err.split())
  assert not (tmp_path / "out").exists()
