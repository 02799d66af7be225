"""The command of `experiments.accelerators`, and what compiled attentions have to be.

Programs are compiled in a process of their own: the compilers' plugins would disturb
other tests.
"""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
from helpers.pages import ROOT

from experiments.accelerators import __main__ as accelerators
from experiments.accelerators import compiling
from experiments.accelerators.methods import METHODS, TPUS, Options, Shape, case_of

# Length 2,048: a float32 matrix of all pairs of one head takes 16 MiB.
SHAPE, LONG = Shape(2, 2, 128, 16), Shape(1, 2, 2048, 16)
FREE = (
  "softmax", "softmax_step", "gaussian@2", "asap", "asap_step", "asap_unsliced",
  "asap_unsliced_step", "potentials", "potentials_step",
)  # fmt: skip
LOOPING = "sinkhorn", "sinkhorn_chunked", "gaussian@2_step"


@functools.cache
def results(device, shape, methods, *options):
  """Rows of a run by method; skipped where nothing compiles for the device."""
  if compiling.missing(device):
    pytest.skip(f"nothing here compiles for {device}: needs the extra `accelerators`")
  size = ",".join(map(str, shape))
  out = ROOT / "build" / "accelerators" / f"{os.getpid()}_{device}_{size}"
  command = [
    *(sys.executable, "-m", "experiments.accelerators", "--out", str(out)),
    *("--devices", device, "--shapes", size, "--methods", *methods, *options),
  ]
  # What makes tests fast on a CPU is not what an accelerator's compiler is to do.
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  run = subprocess.run(
    command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900
  )
  assert run.returncode == 0, run.stderr
  found = json.loads((out / "results.json").read_text())
  (out / "results.json").unlink()
  rows = {row["method"]: row for row in found["rows"]}
  assert rows.keys() == set(methods)
  return rows


DEVICES = pytest.mark.parametrize(
  "device", ["h100", pytest.param("v5e", marks=pytest.mark.slow)]
)


@DEVICES
@pytest.mark.parametrize("method", FREE)
def test_devices_that_share_batch_and_heads_do_not_talk(device, method):
  row = results(device, SHAPE, FREE + LOOPING)[method]
  assert row["collectives"] == row["while_on_data"] == 0
  assert row["gather"] == row["scatter"] == 0


@DEVICES
@pytest.mark.parametrize("method", LOOPING)
def test_loops_and_communication_would_be_seen(device, method):
  row = results(device, SHAPE, FREE + LOOPING)[method]
  assert row["while_on_data"] > 0
  assert row["collective_kinds"]["all-reduce"] == row["collectives"] > 0
  # A loop over iterations is no loop on data.
  assert row["while"] > row["while_on_data"] or method == "gaussian@2_step"


@DEVICES
def test_chunks_form_no_matrix(device):
  rows = results(device, LONG, ("sinkhorn", "sinkhorn_chunked", "potentials"))
  matrices = 4 * LONG.heads * LONG.length**2
  assert rows["sinkhorn"]["largest_array_bytes"] >= matrices
  assert rows["sinkhorn"]["temp_bytes"] >= matrices
  assert "collectives" not in rows["sinkhorn"]  # its batch is not shared
  # So much for a potential of eight slices, and its points.
  assert rows["potentials"]["temp_bytes"] < 64 * 8 * LONG.heads * LONG.length


# The last two do not fit into fast memory: a kernel of every half-iteration.
SHAPES = Shape(8, 8, 1024, 64), Shape(2, 8, 4096, 64), Shape(1, 8, 16384, 64)


def test_chunks_of_16384_tokens_take_less_than_200_megabytes():
  row = results("h100", SHAPES[-1], ("sinkhorn_chunked",))["sinkhorn_chunked"]
  assert row["temp_bytes"] < 200e6


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", TPUS)
def test_kernels_compile_for_tpus(device, shape):
  # Beyond fast memory the gradient is no kernel, and takes long to compile.
  steps = ("sinkhorn_pallas_step",) if shape.length <= 1024 else ()
  for row in results(device, shape, ("sinkhorn_pallas", *steps)).values():
    assert "failed" not in row
    assert row["custom_call"] > 0
    assert row["while_on_data"] == row["gather"] == row["scatter"] == 0
    # What is padded from 64 to the 128 lanes of a register is twice as large; of all
    # pairs there would be eight times as much at the least.
    tokens = 4 * math.prod(shape)
    assert row["largest_array_bytes"] <= 2 * tokens
    if shape.batch % 2 == 0:
      assert row["collectives"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_function_of_tokens(method):
  import jax

  options = Options("bfloat16", slices=2, iterations=2)
  tokens = accelerators.tokens(SHAPE, options)
  case = case_of(method, SHAPE, options)
  found = jax.eval_shape(case.function, tokens, tokens, tokens, *case.parameters)
  if method.endswith("_step"):
    assert [x.shape for x in found[1]] == [tokens.shape] * 3
  elif method != "potentials":
    assert found.shape == tokens.shape


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path):
  monkeypatch.setitem(compiling.DEVICES, "h100", ("no_such.plugin", "1x1x{}"))
  with pytest.raises(SystemExit, match=r'^Nothing here compiles for h100: pip .*\]"$'):
    accelerators.main(["--out", str(tmp_path / "out"), "--devices", "h100"])


def test_what_cannot_be_compiled_is_a_row_with_its_reason(monkeypatch, tmp_path):
  def refuse(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")

  monkeypatch.setattr(accelerators, "compiled", refuse)
  monkeypatch.setattr(accelerators, "missing", lambda device: None)
  monkeypatch.setattr(accelerators, "_call", lambda *_: ())
  out = tmp_path / "out"
  command = "--devices h100 --shapes 1,1,8,4 --methods softmax --out"
  accelerators.main([*command.split(), str(out)])
  (row,) = json.loads((out / "results.json").read_text())["rows"]
  assert row["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
  assert (row["batch"], row["length"]) == (1, 8)


def test_kernels_for_a_tpu_are_not_compiled_for_a_gpu():
  options = Options("float32", slices=2, iterations=2)
  row = accelerators.row_of("h100", SHAPE, "sinkhorn_pallas_step", options)
  assert row["failed"] == "a kernel for TPUs, which would be interpreted"


@pytest.mark.parametrize("shape", ["8,8,1024", "8,8,0,64", "a,b,c,d", "1,2,3,4,5"])
def test_shapes_that_make_no_sense_are_refused(shape, capsys, tmp_path):
  with pytest.raises(SystemExit):
    accelerators.main(["--out", str(tmp_path / "new"), "--shapes", shape])
  assert f"{shape!r}: expected batch, heads, length" in capsys.readouterr().err


TEXT = """
%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g.1 = f32[4]{0} gather(%a, %b), dimensions={}
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %g.1)
}

%counts (p: (s32[])) -> pred[] {
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%asks (p: (pred[])) -> pred[] {
  ROOT %n = pred[] not(%p)
}

%fused (p: f32[4]) -> f32[4,4] {
  ROOT %b.1 = f32[4096,4096]{1,0} broadcast(%p), dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %w.1 = (s32[], f32[4]{0}) while(%t.1), condition=%counts, body=%body.1
  %w.2 = (s32[], bf16[8,16]{1,0:T(8,128)}) while(%t.2), condition=%asks, body=%body.1
  %f = f32[4]{0} fusion(%w.1), kind=kLoop, calls=%fused
  %s = (f32[4]{0}, s32[4]{0}) sort(%f, %i), to_apply=%counts
  %r.1 = f32[4]{0} all-reduce-start(%f), to_apply=%fused
  %r.2 = f32[4]{0} all-reduce-done(%r.1)
  ROOT %r.3 = f32[4]{0} all-reduce(%r.2), to_apply=%fused
}
"""


class Program:
  """A compiled function as JAX describes it."""

  temp_size_in_bytes, generated_code_size_in_bytes = 7, 9

  def as_text(self):
    return TEXT

  def memory_analysis(self):
    return self


def test_operations_are_counted_in_the_text_of_a_program():
  assert compiling.facts(Program()) == {
    "temp_bytes": 7,
    "code_bytes": 9,
    "largest_array_bytes": 2 * 8 * 16,  # what is in a fusion is not written
    "gather": 1,
    "scatter": 0,
    "sort": 1,
    "while": 2,
    "conditional": 0,
    "custom_call": 0,
    "while_on_data": 1,
  }
  assert compiling.collectives(Program()) == {"all-reduce": 2}
