"""The scripts of the page on serving run where there is nothing else."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.pages import ROOT, examples

PAGE = ROOT / "docs" / "serving.md"
BLOCKS = examples(PAGE)


def script(name):
  (found,) = (block for block in BLOCKS if block.startswith(f"# {name}\n"))
  return found


def serve(name, folder, without):
  """Runs a script of the page where importing some packages is an error."""
  blocked = f"import sys\nsys.modules.update(dict.fromkeys({without}))\n"
  (folder / name).write_text(blocked + script(name))
  subprocess.run(
    [sys.executable, name, "given.npz"],
    cwd=folder,
    env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    check=True,
  )


def test_scripts_are_short():
  for name in ("serve_jax.py", "serve_onnx.py"):
    assert len(script(name).splitlines()) <= 15


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter
def test_the_page_runs(tmp_path, monkeypatch, unchecked):
  monkeypatch.chdir(tmp_path)
  names = {"__name__": "page"}
  exec(compile(BLOCKS[0], str(PAGE), "exec"), names)
  model, x, valid = names["compiled"], names["tokens"][1], names["valid"]
  np.savez("given.npz", tokens=x[:7], valid=valid[:7])
  serve("serve_jax.py", tmp_path, ["asap_jax", "flax", "ott", "orbax"])
  wanted = model(x[:7], valid[:7])
  np.testing.assert_allclose(np.load("served_by_jax.npy"), wanted, atol=1e-5)
  for module in ("jax2onnx", "onnxruntime"):
    pytest.importorskip(module, reason="of the extra `onnx`")
  (made,) = (block for block in BLOCKS if "export_onnx(" in block)
  exec(compile(made, str(PAGE), "exec"), names)
  serve("serve_onnx.py", tmp_path, ["asap_jax", "flax", "jax"])
  np.testing.assert_allclose(np.load("served_by_onnx.npy"), wanted, atol=1e-5)
