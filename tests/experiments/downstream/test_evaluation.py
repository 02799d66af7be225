"""Accuracy, shifts, and the share of a gain that is recovered."""

import argparse

import jax.numpy as jnp
import numpy as np
import pytest

import asap_jax
from experiments.common.results import pooled_row
from experiments.downstream import evaluation

RANDOM = np.random.default_rng(0)


def test_compiler_is_asked_for_every_form(monkeypatch):
  asked = []

  def compile(teacher, batches, recipe, *, seed):
    asked.append((recipe, seed))
    layers = [argparse.Namespace(chosen=name) for name in ("half", "sinkhorn@3")]
    return f"model {len(asked)}", argparse.Namespace(seconds=1.5, layers=layers)

  monkeypatch.setattr(asap_jax, "compile", compile)
  models, about = evaluation.compiled(
    None, [], slices=4, refine_steps=6, seed=7, names=evaluation.COMPILED
  )
  ridge = {"directions": "gaussian", "features": ("potentials",), "refine_steps": 0}
  assert asked == [
    (asap_jax.Recipe(4, **ridge), 7),
    (asap_jax.Recipe(4, refine_steps=6), 7),
    (asap_jax.Recipe(4, refine_steps=6, closures=2), 7),
    (None, 7),
  ]
  names = ("ridge", "asap", "asap@2", "best")
  assert models == {name: f"model {i}" for i, name in enumerate(names, start=1)}
  assert about["asap@2"] == {"slices": 4, "closures": 2, "compile_seconds": 1.5}
  assert about["best"] == {"chosen": ["half", "sinkhorn@3"], "compile_seconds": 1.5}
  # Whatever is told of compiling can be pooled over seeds.
  for of_method in about.values():
    assert pooled_row([of_method] * 2)["compile_seconds"] == 1.5


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
  found = evaluation.accuracies({"guess": run}, batches)
  assert found == {"guess": np.mean(guesses == labels), "n_test": 23}
  assert sizes == [10, 10, 10]


def test_shifted_texts_lose_their_second_half():
  valid = np.arange(7) < np.array([[7], [2], [4]])
  batch = {"ids": np.ones((3, 7), int), "valid": valid, "label": np.zeros(3)}
  found = evaluation.shifted(batch)
  np.testing.assert_array_equal(found["valid"].sum(1), [3, 2, 3])
  assert found["valid"][:, 0].all()
  one = {"ids": np.ones((1, 1), int), "valid": np.ones((1, 1), bool)}
  assert evaluation.shifted(one)["valid"].all()


def test_shifted_images_show_their_middle():
  ramp = np.linspace(0.0, 1.0, 16, dtype=np.float32)
  image = np.broadcast_to(ramp[:, None, None], (2, 16, 16, 3))
  found = evaluation.shifted({"image": image})["image"]
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
  found = evaluation.recovered(rows(0.8, 0.6, 0.75))
  assert found == {"asap": pytest.approx(0.75)}
  assert evaluation.recovered(rows(0.8, 0.7995, 0.75)) == {"asap": None}
  assert evaluation.recovered(rows(0.6, 0.8, 0.75)) == {"asap": None}
