"""The command of `experiments.similarity`."""

import importlib.util
import json

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra `pretrained`")
from helpers.encoder_directory import write
from helpers.small_training import task

import asap_jax
from experiments.similarity import __main__ as similarity


def test_rows_are_cosines_and_a_correlation():
  random = np.random.default_rng(0)
  one, other = random.normal(size=(2, 20, 4))
  rows = similarity.rows_of({"softmax": one, "same": 3 * one, "other": other})
  assert [row["method"] for row in rows] == ["softmax", "same", "other"]
  for row in rows[:2]:
    assert row["cosine"] == pytest.approx(1)
    assert row["correlation"] == pytest.approx(1)
  norms = [np.sqrt((each**2).sum(1)) for each in (one, other)]
  cosine = [one[i] @ other[i] / norms[0][i] / norms[1][i] for i in range(20)]
  assert rows[2]["cosine"] == pytest.approx(np.mean(cosine))
  pairs = [
    [each[i] @ each[i + 1] / own[i] / own[i + 1] for i in range(0, 20, 2)]
    for each, own in zip((one, other), norms, strict=True)
  ]
  assert rows[2]["correlation"] == pytest.approx(np.corrcoef(*pairs)[0, 1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
def test_the_command_converts_compiles_and_times(tmp_path, monkeypatch):
  exact = asap_jax.compiler.Sinkhorn(1)
  own = asap_jax.compile
  monkeypatch.setattr(
    asap_jax, "compile", lambda *args, **options: own(*args, exact, **options)
  )
  monkeypatch.setattr(similarity, "load_task", lambda *_, **__: task())
  monkeypatch.setattr(similarity, "LENGTHS", (8, 16, 32))
  out = tmp_path / "out"
  given = ["--init", write(tmp_path / "tiny"), "--length", 8, "--iterations", 2]
  given += ["--dataset", "news", "--out", out, "--pairs", 10]
  served = importlib.util.find_spec("jax2onnx") is not None
  given += ["--onnx"] * served
  similarity.main([str(each) for each in given])
  rows = json.loads((out / "results.json").read_text())["rows"]
  assert [each["method"] for each in rows] == [
    "softmax",
    "plain switch",
    "sinkhorn",
    "best",
  ]
  # As long as there are positions.
  assert {"milliseconds_8", "milliseconds_16"} <= rows[3].keys()
  assert "milliseconds_32" not in rows[3]
  assert rows[0]["cosine"] == pytest.approx(1, abs=1e-6)
  assert rows[2]["cosine"] > 0.9
  if served:
    assert all(each["onnx_milliseconds"] > 0 for each in rows)
    assert all(each["onnx_difference"] < 1e-5 for each in rows)
    assert (out / "plain_switch.onnx").exists()
