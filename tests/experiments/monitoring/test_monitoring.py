"""Watched models on shifted inputs: rows of a small run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import asap_jax
from asap_jax.compiler import Reading
from experiments.common.attentions import build
from experiments.monitoring import __main__ as monitoring
from experiments.monitoring import cost, lengths


def test_an_alarm_of_any_head_counts_for_the_batch_and_its_share_for_heads():
  silent = Reading(jnp.array([0.1, 0.2]), jnp.array([0.2, 0.3]))
  loud = Reading(jnp.array([0.3, 0.2]), jnp.array([0.2, 0.3]))
  assert not monitoring.is_alarm({"a": silent})
  assert monitoring.is_alarm({"a": silent, "b": loud})
  assert monitoring.alarms_of({"a": silent, "b": loud}) == 0.25
  assert monitoring.shown_by({"a": silent, "b": loud}) == pytest.approx(0.2)


def test_shifts_keep_images_in_their_range():
  inputs = np.linspace(0, 1, 3 * 64, dtype=np.float32).reshape(3, 64, 1)
  found = monitoring.shifted(inputs, np.random.default_rng(0))
  np.testing.assert_array_equal(found["test"], inputs)
  for other in found.values():
    assert other.shape == inputs.shape
    assert other.min() >= 0.0
    assert other.max() <= 1.0
  np.testing.assert_array_equal(np.sort(found["shuffled"], 1), np.sort(inputs, 1))
  assert not np.array_equal(found["shuffled"], inputs)


@pytest.mark.slow
def test_small_run(tmp_path, monkeypatch):
  def models(data, seed, steps, refine_steps):
    teacher = build("sinkhorn@1", monitoring.MODEL, seed)
    return {"cut": asap_jax.monitor(teacher, [data.train.inputs[:32]])}

  monkeypatch.setattr(monitoring, "watched_models", models)
  monkeypatch.setattr(monitoring, "SIZES", (32, 120))
  monkeypatch.setattr(cost, "SIZES", {16: 8})
  monkeypatch.setattr(cost, "REPEATS", 3)
  monkeypatch.setattr(lengths, "TOKENS", 128)
  monkeypatch.setattr(lengths, "COMPILED_AT", 8)
  out = tmp_path / "out"
  monitoring.main(["--out", str(out), "--seeds", "0", "--lengths", "4", "8"])
  rows = json.loads((out / "results.json").read_text())["rows"]
  by_kind = {kind: [r for r in rows if r["kind"] == kind] for kind in ("shift", "cost")}
  test, *others = by_kind["shift"][::2]
  assert test["shift"] == "test"
  assert test["alarms"] == 0.0
  assert {row["shift"] for row in others} == {"inverted", "noisy", "darker", "shuffled"}
  for row in by_kind["cost"]:
    expected = row["watched_milliseconds"] / row["milliseconds"]
    assert row["ratio"] == pytest.approx(expected)
  assert [row["length"] for row in rows if row["kind"] == "length"] == [4, 8]
  assert all(jax.tree.map(np.isfinite, row["shown"]) for row in by_kind["shift"])
