"""Models as ONNX, run by ONNX Runtime, against JAX."""

import functools
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.served import (
  ATTENTION,
  TOKENS,
  encoder,
  expected,
  padded,
  tokens,
)

import asap_jax
import asap_jax.peers
from asap_jax import export_onnx

onnxruntime = pytest.importorskip(
  "onnxruntime", reason="of the extra `onnx`, as jax2onnx"
)
pytest.importorskip("jax2onnx", reason="of the extra `onnx`")
onnx = pytest.importorskip("onnx")
# Shapes in annotations are of numbers alone; the converter warns of its own.
pytestmark = [
  pytest.mark.usefixtures("unchecked"),
  pytest.mark.filterwarnings("ignore"),
]


def run(content, *inputs):
  """The first output of ONNX Runtime."""
  session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
  names = [each.name for each in session.get_inputs()]
  assert names == [f"input_{i}" for i in range(len(inputs))]
  assert [each.name for each in session.get_outputs()] == ["output_0"]
  return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))[0]


@functools.cache
def exported(kind, masked=True):
  return export_onnx(encoder(kind), padded() if masked else tokens())


def case(kind, masked):
  quick = masked and kind in ("sliced", "teacher")
  return pytest.param(kind, masked, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
  ("kind", "masked"),
  [
    *(case(kind, True) for kind in ATTENTION),
    *(case(kind, False) for kind in ("softmax", "sliced", "linear@3", "teacher")),
  ],
)
def test_attention_of_every_kind_and_batches_of_any_size(kind, masked):
  content = exported(kind, masked)
  for batch in (4, 1):
    inputs = padded(batch) if masked else (tokens(batch),)
    wanted = expected(encoder(kind), *inputs)
    np.testing.assert_allclose(run(content, *inputs), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["teacher", "sliced", "softmax"])
def test_sharp_logits_stay_right(kind):
  """Where a kernel's sums leave the range of float32."""
  model = nnx.clone(encoder(kind))
  model.attention.query.kernel[...] = 40 * model.attention.query.kernel[...]
  x, valid = padded()
  content = export_onnx(model, (x, valid))
  np.testing.assert_allclose(
    run(content, x, valid), expected(model, x, valid), atol=2e-3
  )


def test_padding_changes_nothing_and_opset_is_named():
  x, valid = padded()
  other = jnp.where(valid[..., None], x, 7.0)
  content = exported("sliced")
  np.testing.assert_array_equal(run(content, x, valid), run(content, other, valid))
  (own,) = (
    each.version
    for each in onnx.load_from_string(content).opset_import
    if each.domain == ""
  )
  assert own == 23


def test_nothing_loops_or_branches():
  operators = {
    node.op_type
    for kind in ("sliced", "teacher")
    for node in onnx.load_from_string(exported(kind)).graph.node
  }
  assert operators.isdisjoint({"Loop", "If", "Scan"})
  # Sums of exponentials one by one would take most of the time.
  assert "ReduceLogSumExp" not in operators
  assert "LogSoftmax" in operators


ALONE = """
  import sys

  for name in ("asap_jax", "flax", "jax"):
    sys.modules[name] = None  # importing it is an error
  import numpy as np
  import onnxruntime

  session = onnxruntime.InferenceSession("model.onnx")
  x = np.ones((2, 3), np.float32)
  print(session.run(None, {"input_0": x})[0].tolist())
"""


@pytest.mark.slow
def test_files_are_served_without_jax(tmp_path):
  def plain(x):
    return x + 1.0

  path = tmp_path / "model.onnx"
  content = export_onnx(plain, jnp.ones((4, 3)), path)
  assert path.read_bytes() == content
  with pytest.raises(FileExistsError, match="overwrite=True"):
    export_onnx(plain, jnp.ones((4, 3)), path)
  command = [sys.executable, "-c", textwrap.dedent(ALONE)]
  out = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
  assert out.stdout.decode().strip() == str([[2.0] * 3] * 2)


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    ({"opset": 12}, "opset=12: expected 18 to 23"),
    ({"symbolic": "b, n, ..."}, "the first axis alone"),
    ({"symbolic": "b"}, "symbolic='b'"),
    ({"example_inputs": 3}, "example_inputs"),
  ],
)
def test_bad_arguments_are_named(wrong, said):
  given = {"model": lambda x: x, "example_inputs": jnp.ones((2, 3)), **wrong}
  with pytest.raises(ValueError, match=said):
    export_onnx(**given)


@pytest.mark.parametrize(
  ("function", "options", "said"),
  [
    (asap_jax.peers.esp_attention, {}, "esp_attention has no form for ONNX"),
    (
      asap_jax.sinkhorn_attention,
      {"segment_ids": jnp.ones((4, TOKENS), int)},
      "segment_ids: packed sequences",
    ),
  ],
)
def test_what_has_no_form_is_named(function, options, said):
  def attend(x):
    heads = x.reshape(*x.shape[:-1], 2, -1)
    return function(heads, heads, heads, **options)

  with pytest.raises(ValueError, match=said):
    export_onnx(attend, tokens())
