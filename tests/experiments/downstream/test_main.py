"""The downstream experiment: its data, its measures, and a run from end to end."""

import argparse
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import asap_jax
from experiments.common import replacements
from experiments.datasets.prepare import Prepared
from experiments.datasets.tasks import Task
from experiments.downstream import __main__ as downstream
from experiments.downstream import data as downstream_data
from experiments.downstream import evaluation as downstream_eval
from experiments.downstream import presets as downstream_presets
from experiments.downstream import seeds as downstream_run
from experiments.downstream.rows import pooled

RANDOM = np.random.default_rng(0)
WORDS = (
  ("goal", "match", "team"),
  ("bank", "market", "share"),
  ("cell", "gene", "lab"),
)
PRESET = dataclasses.replace(
  downstream_presets.PRESETS["tiny"]["text"],
  width=8,
  heads=2,
  layers=1,
  length=8,
  vocabulary=64,
  steps=6,
  batch_size=8,
  checks=2,
  refine_steps=2,
  calibration=32,
)


def texts(count, seed):
  """Sentences of words of their class, among words that say nothing."""
  random = np.random.default_rng(seed)
  found = []
  for index in range(count):
    words = random.choice((*WORDS[index % 3], "the", "and"), random.integers(2, 9))
    found.append({"input": " ".join(words), "label": index % 3})
  return found


def task(name="news"):
  names = ("sport", "business", "science")
  return Task(name, "text", texts(100, 0), texts(40, 1), 3, names)


def images(count, side=8):
  pixels = RANDOM.integers(256, size=(count, side, side, 3), dtype=np.uint8)
  return [{"input": image, "label": i % 2} for i, image in enumerate(pixels)]


# Data


def test_a_part_of_the_training_split_is_held_out(tmp_path):
  data = downstream_data.load(task(), PRESET, tmp_path, test_limit=24)
  assert [len(part["label"]) for part in (data.train, data.held_out)] == [90, 10]
  assert len(data.prepared.test["label"]) == 24
  rows = lambda part: sorted(map(tuple, part["ids"]))  # noqa: E731
  both = sorted(rows(data.train) + rows(data.held_out))
  assert both == rows(data.prepared.train)


def test_few_training_examples(tmp_path):
  few = task()._replace(train=texts(9, 0))
  with pytest.raises(ValueError, match="news: 9 training examples, expected at least"):
    downstream_data.load(few, PRESET, tmp_path)


@pytest.mark.parametrize(
  ("side", "expected"),
  [((8, 8), None), ((64, 64), None), ((30, 30), 32), ((8, 12), 32)],
)
def test_large_and_odd_images_are_scaled(side, expected):
  preset = downstream_presets.PRESETS["tiny"]["image"]
  one = [{"input": np.zeros((*side, 3), np.uint8), "label": 0}]
  given = Task("images", "image", one, one, 2, ("a", "b"))
  assert downstream_data.image_size_of(given, preset) == expected


def test_examples_that_are_decoded_when_asked():
  source = images(7)
  found = downstream_data.take(source, np.array([5, 1, 3]))
  assert len(found) == downstream_data.count_of(found) == 3
  np.testing.assert_array_equal(found[1]["input"], source[1]["input"])
  read = [row["input"] for row in found.read([2, 0])]
  np.testing.assert_array_equal(read, [source[3]["input"], source[5]["input"]])


@pytest.mark.parametrize(
  ("count", "sizes"), [(200, [64] * 3), (128, [64] * 2), (70, [35] * 2), (7, [3] * 2)]
)
def test_calibration_batches_are_of_one_size(count, sizes):
  given = {"ids": np.arange(300)[:, None], "label": np.zeros(300, np.int32)}
  found = downstream_data.whole_batches(given, None, count)
  assert [len(batch["ids"]) for batch in found] == sizes
  assert all(set(batch) == {"ids"} for batch in found)
  together = np.concatenate([batch["ids"][:, 0] for batch in found])
  np.testing.assert_array_equal(together, np.arange(sum(sizes)) * 300 // sum(sizes))


def test_inputs_of_another_data_set(tmp_path, monkeypatch):
  data = downstream_data.load(task(), PRESET, tmp_path)
  other = Task("other", "text", texts(50, 7), [], 3, ())
  monkeypatch.setattr(downstream_data, "load_task", lambda name, data_dir: other)
  given = ("other", task(), data, PRESET, tmp_path, None)
  batches = downstream_data.foreign_batches(*given)
  assert [batch["ids"].shape for batch in batches] == [(16, 8)] * 2
  # The teacher's tokenizer is taken, for its tokens are what the teacher knows.
  known = {tuple(row) for row in data.prepared.train["ids"][:, :1]}
  assert {tuple(row) for row in np.concatenate([b["ids"] for b in batches])[:, :1]} <= (
    known
  )
  other = Task("other", "image", images(20), images(20), 2, ("a", "b"))
  with pytest.raises(ValueError, match="other holds images: news holds texts"):
    downstream_data.foreign_batches(*given)
  colour = Task("colour", "image", images(20), images(4), 2, ("a", "b"))
  preset = downstream_presets.PRESETS["tiny"]["image"]
  data = downstream_data.load(colour, preset, tmp_path)
  given = ("other", colour, data, preset, tmp_path, None)
  (first, _) = downstream_data.foreign_batches(*given)
  assert first["image"].shape == (10, 8, 8, 3)
  grey = [{**row, "input": row["input"][..., :1]} for row in images(20)]
  other = Task("other", "image", grey, grey, 2, ("a", "b"))
  with pytest.raises(ValueError, match="images of 1 channels: colour has 3"):
    downstream_data.foreign_batches(*given)


# Measures


def test_accuracy_counts_every_example_once():
  labels = RANDOM.integers(3, size=23)
  guesses = RANDOM.integers(3, size=23)
  sizes = []

  def run(batch):
    sizes.append(len(batch["x"]))
    assert "label" not in batch
    return jnp.eye(3)[batch["x"]]

  batches = [
    {"x": guesses[start : start + 10], "label": labels[start : start + 10]}
    for start in range(0, 23, 10)
  ]
  found = downstream_eval.accuracies({"guess": run}, batches)
  assert found == {"guess": np.mean(guesses == labels), "n_test": 23}
  assert sizes == [10, 10, 10]


def test_shifted_texts_lose_their_second_half():
  valid = np.arange(7) < np.array([[7], [2], [4]])
  batch = {"ids": np.ones((3, 7), int), "valid": valid, "label": np.zeros(3)}
  found = downstream_eval.shifted(batch)
  np.testing.assert_array_equal(found["valid"].sum(1), [3, 2, 3])
  assert found["valid"][:, 0].all()
  one = {"ids": np.ones((1, 1), int), "valid": np.ones((1, 1), bool)}
  assert downstream_eval.shifted(one)["valid"].all()


def test_shifted_images_show_their_middle():
  ramp = np.linspace(0.0, 1.0, 16, dtype=np.float32)
  image = np.broadcast_to(ramp[:, None, None], (2, 16, 16, 3))
  found = downstream_eval.shifted({"image": image})["image"]
  assert found.shape == image.shape
  # Two of sixteen rows are gone from either end; what lies between is spread.
  assert found[0, 0, 0, 0] == pytest.approx(ramp[2], abs=1e-6)
  assert found[0, -1, 0, 0] == pytest.approx(ramp[-3], abs=1e-6)
  slopes = np.diff(found[0, 2:-2, 0, 0])
  np.testing.assert_allclose(slopes, (ramp[1] - ramp[0]) * 12 / 16, rtol=1e-4)


def rows(teacher, swap, asap):
  return {
    "softmax": {"accuracy": 0.9},
    "sinkhorn": {"accuracy": teacher, "tv": 0.0},
    "softmax_swap": {"accuracy": swap, "tv": 0.5},
    "asap": {"accuracy": asap, "tv": 0.1},
  }


def test_recovered_is_a_share_of_the_gain():
  found = downstream_eval.recovered(rows(0.8, 0.6, 0.75))
  assert found == {"asap": pytest.approx(0.75)}
  assert downstream_eval.recovered(rows(0.8, 0.7995, 0.75)) == {"asap": None}
  assert downstream_eval.recovered(rows(0.6, 0.8, 0.75)) == {"asap": None}


def test_seeds_are_pooled():
  layers = [{"layer": "a", "tv": 0.2}, {"layer": "b", "tv": 0.4}]
  more = [{"layer": "a", "tv": 0.4}, {"layer": "b", "tv": 0.0}]
  one = {"method": "asap", "accuracy": 0.5, "n_test": 10, "layers": layers}
  two = {"method": "asap", "accuracy": 0.7, "n_test": 10, "layers": more}
  peer = {"method": "esp", "accuracy": 0.4, "recovered": None}
  shift = {"method": "asap", "shift": "half length", "accuracy": 0.1}
  found = pooled([[one, peer, shift], [two, shift]])
  assert found[0] == {
    "method": "asap",
    "accuracy": pytest.approx(0.6),
    "accuracy_std": pytest.approx(np.sqrt(0.02)),
    "accuracies": [0.5, 0.7],
    "n_test": 10,
    "layers": [
      {"layer": "a", "tv": pytest.approx(0.3)},
      {"layer": "b", "tv": pytest.approx(0.2)},
    ],
  }
  assert found[1]["accuracies"] == [0.4, None]
  assert found[1]["recovered"] is None
  assert "accuracy_std" not in found[1]
  assert found[2]["accuracies"] == [0.1, 0.1]
  assert [row["method"] for row in found] == ["asap", "esp", "asap"]


# The command


def call(out, *options):
  arguments = ["--dataset", "news", "--out", out, "--slices", 2, *options]
  downstream.main([str(argument) for argument in arguments])


@pytest.fixture
def small(monkeypatch):
  for module in (downstream, downstream_data):
    monkeypatch.setattr(module, "load_task", lambda name, **_: task(name))
  monkeypatch.setattr(downstream, "preset_of", lambda *_: PRESET)
  monkeypatch.setattr(downstream_run, "REPEATS", 1)
  # Less to compile: one size of batches, and few methods.
  monkeypatch.setattr(downstream_data, "BATCH", 16)
  for name, value in (
    ("CUTS", (1,)),
    ("COMPILED", ("ridge", "asap")),
    ("SHIFTED", ("softmax_swap", "asap")),
  ):
    monkeypatch.setattr(downstream_eval, name, value)


def compile_double(teacher, batches, slices, *, seed, call, **options):
  """In the place of `asap_jax.compile`: Sinkhorn cut to four iterations."""
  assert [batch["ids"].shape for batch in batches] == [(16, 8)] * 2
  assert all("label" not in batch for batch in batches)
  model = replacements.cut_sinkhorn(teacher, 4)
  return model, argparse.Namespace(seconds=slices + len(options))


def test_everything_is_measured_and_resumed(tmp_path, small, capsys, monkeypatch):
  monkeypatch.setattr(asap_jax, "compile", compile_double)
  out = tmp_path / "out"
  given = ("--seeds", 0, "--test-limit", 32, "--shift-dataset", "other")
  call(out, *given)
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  replaced = ["softmax_swap", "sinkhorn@1", "ridge", "asap"]
  assert list(rows) == ["softmax", "sinkhorn", *replaced, "linear"]
  assert rows["sinkhorn"]["tv"] == pytest.approx(0.0, abs=1e-5)
  for name in replaced:
    row = rows[name]
    assert row["tv"] > 0
    assert row["tv"] == pytest.approx(np.mean([each["tv"] for each in row["layers"]]))
    assert row["n_test"] == 32
    assert "recovered" in row or name == "softmax_swap"
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  # Two slices; three options of the plain form, two of the other.
  assert [rows[name]["compile_seconds"] for name in ("ridge", "asap")] == [5, 4]
  assert rows["sinkhorn"]["best_step"] in (3, 6)
  shifted = [row for row in results["rows"] if "shift" in row]
  assert [(row["shift"], row["method"]) for row in shifted] == [
    ("half length", "sinkhorn"),
    ("half length", "softmax_swap"),
    ("half length", "asap"),
    ("compiled on other", "ridge"),
    ("compiled on other", "asap"),
  ]
  assert results["config"]["seeds"] == [0]
  assert results["config"]["preset_values"]["steps"] == 6
  seed = out / "news" / "seed0"
  assert (seed / "sinkhorn" / "metrics.csv").read_text().count("\n") == 3
  assert (seed / "asap" / "compiled" / "manifest.json").is_file()
  for name in ("accuracy.png", "frontier.png"):
    assert (out / name).stat().st_size > 5_000

  # Resumed after its end it measures nothing anew.
  monkeypatch.setattr(downstream_run, "train", None)
  (out / "results.json").unlink()
  call(out, *given, "--resume")
  assert json.loads((out / "results.json").read_text())["rows"] == results["rows"]
  assert "half length" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_models_are_closer_than_a_cut(tmp_path, small):
  out = tmp_path / "out"
  call(out, "--seeds", "0,1", "--test-limit", 32, "--attention", "lot")
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  assert rows["asap"]["tv"] < rows["sinkhorn@1"]["tv"] < rows["softmax_swap"]["tv"]
  assert rows["asap"]["slices"] == 2
  assert all(len(row["accuracies"]) == 2 for n, row in rows.items() if n != "linear")
  assert "lot" in rows


def message(capsys, out, *options):
  with pytest.raises(SystemExit):
    call(out, *options)
  return " ".join(capsys.readouterr().err.split())


def test_a_run_is_resumed_with_its_own_options(tmp_path, small, capsys, monkeypatch):
  out = tmp_path / "out"
  monkeypatch.setattr(downstream, "load", lambda *_: 1 / 0)
  # Killed early, it can be resumed, even where nothing was written yet.
  for options in (("--resume",), ("--resume", "--data-dir", tmp_path)):
    with pytest.raises(ZeroDivisionError):
      call(out, "--seeds", 0, *options)
  before = (out / "options.json").read_text()
  found = message(capsys, out, "--resume", "--seeds", "0,1")
  assert "--seeds is [0, 1]: the run in" in found
  assert "had [0]; resume it with its own options" in found
  # Without --resume nothing is overwritten, whatever the options.
  assert "name a new directory" in message(capsys, out, "--seeds", 0)
  assert (out / "options.json").read_text() == before
  (out / "options.json").rename(out / "else")
  assert "name a new directory" in message(capsys, out, "--resume", "--seeds", 0)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (("--attention", "espp"), "did you mean 'esp'?"),
    (("--attention", "one_sided"), "calibrated on a trained teacher"),
    (("--seeds", "a"), "expected seeds as 0,1,2"),
    (("--steps", "0"), "'0': expected a positive number"),
    (("--refine-steps", "-1"), "expected a number of at least zero"),
    (("--preset", "huge"), "invalid choice: 'huge'"),
  ],
)
def test_options_that_make_no_sense(tmp_path, small, capsys, options, expected):
  assert expected in message(capsys, tmp_path, *options)


def test_a_task_that_cannot_be_read(tmp_path, capsys, monkeypatch):
  def fails(name, **_):
    raise ValueError(f"{name}: not a data set")

  monkeypatch.setattr(downstream, "load_task", fails)
  assert "news: not a data set" in message(capsys, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_peers_whose_loss_is_not_finite_are_left_out(tmp_path, monkeypatch, capsys):
  def fails(model, *_, directory, **__):
    raise FloatingPointError(f"{directory.name} is lost")

  monkeypatch.setattr(downstream_run, "train", fails)
  prepared = Prepared("news", "text", {}, {}, 3, (), vocabulary_size=64, length=8)
  given = {"ids": np.zeros((9, 8), int), "label": np.zeros(9, int)}
  data = downstream_data.Data(prepared, given, given)
  assert downstream_run.train_all(["esp"], data, PRESET, 0, tmp_path) == ({}, {})
  assert "esp is lost" in capsys.readouterr().out
  with pytest.raises(FloatingPointError, match="sinkhorn is lost"):
    downstream_run.train_all(["sinkhorn"], data, PRESET, 0, tmp_path)
