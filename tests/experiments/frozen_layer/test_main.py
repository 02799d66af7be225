"""Teachers from files, and replacing all their attention."""

import argparse
import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pages import ROOT

from asap_jax.compiler import measuring as measure
from asap_jax.compiler.fidelity import Operator, operator_of
from asap_jax.compiler.sites import find_sinkhorn, held_at
from experiments.common import replacements
from experiments.frozen_layer import __main__ as frozen_layer
from experiments.frozen_layer.teachers import load_inputs, load_teacher

TEACHERS = ROOT.parent / "shared" / "teachers"
METHODS = ["sinkhorn", *(f"sinkhorn@{k}" for k in frozen_layer.CUTS)]
METHODS += ["softmax_swap", "ridge", "asap", "asap@2", "asap_unsorted@5"]


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


def run(files, *options):
  """Rows of results.json, by their method."""
  arguments = ["--teacher", files / "teacher.npz", "--inputs", files / "inputs.npz"]
  arguments += ["--heads", 2, "--out", files / "out", "--slices", 4, *options]
  frozen_layer.main([str(argument) for argument in arguments])
  results = json.loads((files / "out" / "results.json").read_text())
  return {row["method"]: row for row in results["rows"]}


@pytest.mark.slow
def test_every_method_is_measured(files, capsys, monkeypatch):
  monkeypatch.setattr(frozen_layer, "BATCH", 4)  # the six test inputs are 1.5 batches
  # Rows are measured apart from the report, whose other cuts take long to compile.
  monkeypatch.setattr(measure, "CUTS", (1,))
  rows = run(files, "--refine-steps", 3, "--test-limit", 6)
  assert list(rows) == METHODS
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  assert rows["asap"]["tv"] < rows["ridge"]["tv"] < rows["softmax_swap"]["tv"]
  assert all(row["n_test"] == 6 for row in rows.values())
  compiled = {name: row["closures"] for name, row in rows.items() if "closures" in row}
  assert compiled == {"ridge": 1, "asap": 1, "asap@2": 2, "asap_unsorted@5": 5}
  assert all(rows[name]["compile_seconds"] > 0 for name in compiled)
  assert (files / "out" / "frontier.png").stat().st_size > 5_000
  printed = capsys.readouterr().out
  for name in ("asap", "asap@2", "asap_unsorted@5"):
    assert f"{name}: TV {rows[name]['tv']:.4f} in " in printed
  # The last batch, which is not full, counts like the others.
  teacher = load_teacher(files / "teacher.npz", heads=2)
  (whole,) = replacements.plan_fidelity(
    teacher,
    {"cut": replacements.cut_sinkhorn(teacher, 1)},
    [load_inputs(files / "inputs.npz", 6).test],
    lambda model, batch: model(batch),
  ).values()
  for name, value in whole.items():
    assert rows["sinkhorn@1"][name] == pytest.approx(value, rel=1e-4)


def test_results_are_not_overwritten(files, capsys):
  (files / "out").mkdir()
  (files / "out" / "results.json").write_text("kept")
  with pytest.raises(SystemExit):
    run(files)
  assert "name a new directory" in capsys.readouterr().err
  assert (files / "out" / "results.json").read_text() == "kept"


def options_of(monkeypatch, **arguments):
  """What `compile_all` asks of the compiler, method by method; and its rows."""
  asked = []

  def compile(teacher, batches, slices, **options):
    asked.append(options)
    return f"model {len(asked)}", argparse.Namespace(seconds=1.5)

  monkeypatch.setattr(frozen_layer.asap_jax, "compile", compile)
  given = {"features": ["query"], "slices": 4, "seed": 7, "closures": 1}
  args = argparse.Namespace(**(given | {"refine_steps": None} | arguments))
  return asked, *frozen_layer.compile_all(None, [], args)


def test_compiler_is_asked_for_every_form(monkeypatch):
  asked, models, about = options_of(monkeypatch, closures=3)
  ridge = {"directions": "gaussian", "features": ("potentials",), "refine": False}
  own = {"features": ("query",), "refine": True}
  unsorted = {"features": ("query", "cumulants"), "hidden": 0}
  assert asked == [
    {**ridge, "closures": 1, "seed": 7},
    {**own, "closures": 3, "seed": 7},
    {**own, "closures": 2, "seed": 7},
    {**unsorted, "refine": True, "closures": 5, "seed": 7},
  ]
  names = ("ridge", "asap", "asap@2", "asap_unsorted@5")
  assert models == {name: f"model {i}" for i, name in enumerate(names, start=1)}
  assert about["asap_unsorted@5"]["slices"] == 0
  assert about["asap"] == {"slices": 4, "closures": 3, "compile_seconds": 1.5}


def test_two_closures_are_compiled_once(monkeypatch):
  asked, models, about = options_of(monkeypatch, closures=2, refine_steps=0)
  assert [options["closures"] for options in asked] == [1, 2, 5]
  assert not any(options["refine"] for options in asked)
  assert models["asap"] == models["asap@2"] == "model 2"
  assert about["asap"] == about["asap@2"]


def test_refinement_steps_are_passed_on():
  assert frozen_layer.refinement(0) == {"refine": False}
  assert frozen_layer.refinement(9) == {"refine": True, "refine_steps": 9}
  assert frozen_layer.refinement(None) == {"refine": True}


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


def test_cuts_are_measured_in_their_fastest_form(files):
  teacher = load_teacher(files / "teacher.npz", heads=2)
  for given in (teacher, replacements.cut_sinkhorn(teacher, 5)):
    cut = replacements.cut_sinkhorn(given, 3)
    (site,) = find_sinkhorn(cut)
    assert operator_of(held_at(cut, site)) == Operator("sinkhorn", 3)
    swapped = replacements.softmax_swap(given)
    assert operator_of(held_at(swapped, site)) == Operator("softmax")
    ids = load_inputs(files / "inputs.npz", 4).test
    assert np.isfinite(swapped(jnp.asarray(ids))).all()
