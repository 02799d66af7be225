"""The command on directories of TFDS, of the data sets that it has presets for."""

import dataclasses
import json

import pytest
from helpers import tfds_sets

from experiments.downstream import __main__ as downstream
from experiments.downstream import data as sources
from experiments.downstream import evaluation, seeds
from experiments.downstream.presets import preset_of

WRITERS = {
  "dbpedia_14": tfds_sets.write_dbpedia,
  "yelp_review_full": tfds_sets.write_yelp,
  "cats_vs_dogs": tfds_sets.write_cats,
  "cifar100": tfds_sets.write_cifar100,
}
TESTED = {"dbpedia_14": 28, "yelp_review_full": 20, "cats_vs_dogs": 12, "cifar100": 20}


def narrow(*of):
  return dataclasses.replace(preset_of(*of), width=16, layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_the_command_runs_to_its_end(tmp_path, monkeypatch, name):
  monkeypatch.setattr(seeds, "REPEATS", 3)
  monkeypatch.setattr(sources, "BATCH", 8)
  # Less to compile.
  for lists, kept in (("CUTS", (1,)), ("COMPILED", ("ridge", "asap")), ("SHIFTED", ())):
    monkeypatch.setattr(evaluation, lists, kept)
  monkeypatch.setattr(downstream, "preset_of", narrow)
  folder, out = WRITERS[name](tmp_path / "tfds"), tmp_path / "out"
  given = f"--seeds 0 --steps 2 --batch-size 8 --slices 2 --refine-steps 0 --out {out}"
  names = ["--dataset", name, "--data-dir", str(folder)]
  lengths = ["--length", "12"] if name in ("dbpedia_14", "yelp_review_full") else []
  # What follows training differs by the kind of the data alone.
  alone = ["--train-only"] if name in ("dbpedia_14", "cifar100") else []
  downstream.main([*names, *given.split(), *lengths, *alone])
  results = json.loads((out / "results.json").read_text())
  rows = {row["method"]: row for row in results["rows"] if "shift" not in row}
  assert {"softmax", "sinkhorn", "linear"} <= set(rows)
  assert bool(alone) == ("ridge" not in rows)
  assert rows["sinkhorn"]["n_test"] == TESTED[name]
  assert 0 <= rows["sinkhorn"]["accuracy"] <= 1
  if lengths:  # a class is told by its word
    assert rows["linear"]["accuracy"] > 0.5


@pytest.mark.parametrize(
  ("name", "length"),
  [
    ("yelp_review_full", 128),
    ("Yelp__yelp_review_full/yelp_review_full", 128),
    ("huggingface:yelp_polarity_reviews", 128),
    ("dbpedia_14", 64),
  ],
)
def test_reviews_keep_both_ends(name, length):
  preset = preset_of("tiny", "text", name)
  assert preset.length == length
  assert (preset.keep == "both") == (length == 128)
