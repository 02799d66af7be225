"""Teachers from files, and replacing all their attention."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import frozen_layer
from experiments.frozen import load_inputs, load_teacher

TEACHERS = pathlib.Path(__file__).parents[2] / "shared" / "teachers"
METHODS = ["sinkhorn", *(f"sinkhorn@{k}" for k in frozen_layer.CUTS)]
METHODS += ["softmax_swap", "ridge", "asap"]


@pytest.fixture
def files(tmp_path):
  """A random teacher of one layer for token ids, and inputs with padding."""
  random = np.random.default_rng(0)
  width, length, words = 16, 12, 30

  def matrix(*shape):
    return random.normal(size=shape).astype(np.float16) / shape[0] ** 0.5

  weights = {
    "emb": matrix(words, width),
    "pos": matrix(length, width),
    "qkv0": 1.5 * matrix(width, 3 * width),
    "o0": matrix(width, width),
    "m10": matrix(width, 4 * width),
    "m20": matrix(4 * width, width),
    "out": matrix(width, 3),
  }
  ids = random.integers(1, words, size=(136, length))
  ids[np.arange(length) >= random.integers(6, length + 1, size=(136, 1))] = 0
  np.savez(tmp_path / "teacher.npz", **weights)
  inputs = dict(
    xtrain=ids[:128].astype(np.int32),
    xtest=ids[128:].astype(np.int32),
    ytest=random.integers(3, size=8),
  )
  np.savez(tmp_path / "inputs.npz", **inputs)
  return tmp_path


def test_every_method_is_measured(files):
  arguments = ["--teacher", files / "teacher.npz", "--inputs", files / "inputs.npz"]
  arguments += ["--heads", 2, "--out", files / "out", "--slices", 4]
  arguments += ["--refine-steps", 3, "--test-limit", 6]
  frozen_layer.main([str(argument) for argument in arguments])
  results = json.loads((files / "out" / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"]}
  assert list(rows) == METHODS
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  assert rows["asap"]["tv"] < rows["ridge"]["tv"] < rows["softmax_swap"]["tv"]
  assert all(row["n_test"] == 6 for row in rows.values())
  assert (files / "out" / "frontier.png").stat().st_size > 5_000


def test_files_of_another_kind_are_refused(files):
  with pytest.raises(ValueError, match="expected a teacher's weights"):
    load_teacher(files / "inputs.npz", heads=2)
  with pytest.raises(ValueError, match="heads=3: expected a divisor of the width 16"):
    load_teacher(files / "teacher.npz", heads=3)


@pytest.mark.skipif(not TEACHERS.is_dir(), reason="the frozen teachers are not here")
@pytest.mark.parametrize("name", ["cifar10", "imdb"])
def test_forward_pass_is_the_reference(name):
  path = TEACHERS / "reference_forward.py"
  spec = importlib.util.spec_from_file_location("reference_forward", path)
  reference = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(reference)
  sizes = reference.SPECS[name]
  inputs = load_inputs(TEACHERS / f"{name}_inputs.npz", 2).test
  found = load_teacher(TEACHERS / f"{name}.npz", sizes["heads"])(jnp.asarray(inputs))
  scaled = inputs / np.float32(127.5) - 1.0 if name == "cifar10" else inputs
  expected, _ = reference.forward(
    reference.load(TEACHERS / f"{name}.npz"),
    jnp.asarray(scaled),
    reference.sinkhorn(20),
    **sizes,
  )
  np.testing.assert_allclose(found, expected, atol=2e-3)
