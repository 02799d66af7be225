"""Replacing all attention of a frozen teacher."""

import argparse
import functools
import json

import numpy as np
import pytest

import asap_jax
from asap_jax.compiler import measuring, selection
from experiments.common import replacements
from experiments.common.frozen_teachers import load_inputs, load_teacher
from experiments.frozen_layer import __main__ as frozen_layer

METHODS = ["sinkhorn", *(f"sinkhorn@{k}" for k in frozen_layer.CUTS)]


METHODS += ["softmax_swap", "ridge", "asap", "asap@2", "asap_unsorted@5", "best"]


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
  for module in (measuring, selection):
    monkeypatch.setattr(module, "CUTS", (1,))
  monkeypatch.setattr(selection, "STARTS", ())
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

  def compile(teacher, batches, recipe, seed):
    asked.append((recipe, seed))
    layers = [argparse.Namespace(chosen="half")]
    return f"model {len(asked)}", argparse.Namespace(seconds=1.5, layers=layers)

  monkeypatch.setattr(frozen_layer.asap_jax, "compile", compile)
  given = {"features": ["query"], "slices": 4, "seed": 7, "closures": 1}
  given["compiled"] = frozen_layer.COMPILED_ROWS
  args = argparse.Namespace(**(given | {"refine_steps": None} | arguments))
  return asked, *frozen_layer.compile_all(None, [], args)


def test_compiler_is_asked_for_every_form(monkeypatch):
  asked, models, about = options_of(monkeypatch, closures=3)
  recipe = functools.partial(asap_jax.Recipe, 4)
  ridge = {"directions": "gaussian", "features": ("potentials",), "refine_steps": 0}
  own = {"features": ("query",)}
  unsorted = {"features": ("query", "cumulants"), "hidden": 0}
  assert asked == [
    (recipe(**ridge), 7),
    (recipe(**own, closures=3), 7),
    (recipe(**own, closures=2), 7),
    (recipe(**unsorted, closures=5), 7),
    (None, 7),
  ]
  names = ("ridge", "asap", "asap@2", "asap_unsorted@5", "best")
  assert models == {name: f"model {i}" for i, name in enumerate(names, start=1)}
  assert about["asap_unsorted@5"]["slices"] == 0
  assert about["ridge"] == {"slices": 4, "closures": 1, "compile_seconds": 1.5}
  assert about["best"] == {"chosen": ["half"], "compile_seconds": 1.5}


def test_two_closures_are_compiled_once(monkeypatch):
  asked, models, about = options_of(monkeypatch, closures=2, refine_steps=0)
  *recipes, last = [recipe for recipe, _ in asked]
  assert [recipe.closures for recipe in recipes] == [1, 2, 5]
  assert all(recipe.refine_steps == 0 for recipe in recipes)
  assert last is None
  assert models["asap"] == models["asap@2"] == "model 2"
  assert about["asap"] == about["asap@2"]


def test_some_rows_alone_are_compiled(monkeypatch):
  asked, models, _ = options_of(monkeypatch, compiled=["best", "asap@2"])
  assert list(models) == ["best", "asap@2"]
  assert [recipe and recipe.closures for recipe, _ in asked] == [None, 2]


def message(capsys, files, *options):
  """The last line of what the command says before it ends."""
  with pytest.raises(SystemExit):
    run(files, *options)
  return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (("--heads", 0), "--heads: '0': expected an integer from 1 up"),
    (("--heads", -2), "--heads: '-2': expected an integer from 1 up"),
    (("--heads", 3), "heads=3: expected a divisor of the width 16"),
    (("--slices", -2), "--slices: '-2': expected an integer from 1 up"),
    (("--refine-steps", -1), "--refine-steps: '-1': expected an integer from 0 up"),
    (("--test-limit", 0), "--test-limit: '0': expected an integer from 1 up"),
    (("--teacher", "none.npz"), "--teacher: none.npz is not a file"),
    (("--out", __file__), "--out: "),
  ],
)
def test_arguments_that_make_no_sense(files, capsys, options, expected):
  assert expected in message(capsys, files, *options)


def test_files_of_another_form(files, capsys):
  one = files / "one.npy"
  np.save(one, np.zeros(3))
  assert "one.npy holds one array: expected" in message(capsys, files, "--teacher", one)
  (files / "words.npz").write_text("no arrays")
  assert "words.npz cannot be read: " in message(
    capsys, files, "--inputs", files / "words.npz"
  )
  # The weights again, instead of inputs.
  assert "teacher.npz lacks ['xtest', 'xtrain', 'ytest']: expected inputs" in message(
    capsys, files, "--inputs", files / "teacher.npz"
  )
  assert not (files / "out").exists()
