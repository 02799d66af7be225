"""The clock, the yardsticks and the command of `experiments.speed`."""

import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracles
from helpers.pages import ROOT

import asap_jax
from experiments.common.attentions import build_attention
from experiments.common.timing import time_interleaved, times_of
from experiments.speed import __main__ as speed
from experiments.speed import attentions as speed_attentions
from experiments.speed import display as speed_report
from experiments.speed import problem as speed_problem
from experiments.speed.methods import METHODS, PEERS, candidates
from experiments.speed.problem import Shape, make_problem

SHAPE = Shape(batch=2, heads=2, length=6, head_dim=4, dtype="float32")


class Clock:
  """Seconds that pass only while a call runs."""

  def __init__(self, seconds):
    self.now, self.seen, self.seconds = 0.0, [], seconds

  def __call__(self):
    return self.now

  def calls(self):
    return {name: lambda name=name: self.run(name) for name in self.seconds}

  def run(self, name):
    self.now += self.seconds[name]
    self.seen.append(name)


def test_repeats_go_over_all_calls_in_an_order_drawn_by_seed():
  def order(seed):
    clock = Clock(dict.fromkeys("abcd", 1.0))
    time_interleaved(clock.calls(), 3, seed, clock=clock)
    assert clock.seen[:4] == list("abcd")  # one call each, before any is timed
    return [clock.seen[i : i + 4] for i in range(4, len(clock.seen), 4)]

  rounds = order(0)
  assert [sorted(names) for names in rounds] == [list("abcd")] * 3
  assert rounds == order(0) != order(1)
  assert len({tuple(names) for names in rounds}) > 1


@pytest.mark.parametrize("queued", [False, True])
def test_short_calls_are_looped_over_and_long_ones_repeated_less(queued):
  clock = Clock({"short": 2.0**-10, "long": 1.0})
  times = time_interleaved(clock.calls(), 15, queued=queued, clock=clock)
  assert times["short"] == (2.0**-10 * 1e3, (2.0**-10 * 1e3,) * 2, 15)
  assert times["long"] == (1e3, (1e3, 1e3), 3)
  assert clock.seen.count("long") == 4
  loops = " ".join(clock.seen).split("long")
  # A loop of short calls lasts 0.02 s or more, but not much.
  assert all(20 < loop.count("short") < 80 for loop in loops[2:-1] if loop.strip())


def test_times_are_medians_and_quartiles():
  assert times_of([4.0, 1.0, 2.0, 100.0, 3.0]) == (3.0, (2.0, 4.0), 5)


def test_a_single_repeat_is_refused():
  with pytest.raises(ValueError, match="repeats=1: expected at least 3"):
    time_interleaved({}, 1)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, 2.0])
def test_exponent_of_a_power_law(power):
  points = [(n, 0.3 * n**power) for n in (64, 197, 1024)]
  assert speed_report.scaling_exponent(points) == pytest.approx(power)


@pytest.mark.parametrize("points", [[], [(64, 1.0)], [(64, 1.0), (64, 2.0)]])
def test_one_length_has_no_exponent(points):
  assert speed_report.scaling_exponent(points) is None


def test_ratios_are_to_the_fastest_softmax_of_the_kind():
  times = [("softmax", 3.0), ("softmax", 2.0), ("asap", 5.0), ("sinkhorn_step", 8.0)]
  rows = [{"method": name, "milliseconds": value} for name, value in times]
  ratios = [row.get("ratio_to_softmax") for row in speed.with_ratios(rows)]
  assert ratios == [1.5, 1.0, 2.5, None]
  rows.append({"method": "softmax_step", "milliseconds": 4.0})
  assert speed.with_ratios(rows)[3]["ratio_to_softmax"] == 2.0


def test_curves_are_per_sequence_and_head():
  row = {"method": "softmax", "implementation": "xla", "batch": 4, "heads": 2}
  rows = [row | {"length": 64, "temp_bytes": 800}, row | {"length": 128}]
  rows[1] |= {"batch": 1, "temp_bytes": 0}
  assert speed_report.curves(rows, "temp_bytes") == {
    ("softmax", "xla", None): [(64, 100.0)]
  }


def parse(*arguments):
  return speed._parser().parse_args(["--out", "new", *arguments])


def test_presets_try_less_on_brief_shapes():
  plans = {plan.shape.length: plan for plan in speed.plans_of(parse("--preset", "cpu"))}
  assert list(plans) == sorted(plans)
  assert plans[1024].shape == (1, 8, 1024, 64, "float32")
  assert plans[128].shape == (8, 8, 128, 64, "float32")
  assert set(METHODS) - set(plans[1024].methods) == set(PEERS)
  assert plans[1024].slices == (8, 2, 4)
  assert set(METHODS) - set(plans[4096].methods) == {*PEERS, *speed.FULL_ONLY}
  assert plans[4096].slices == (8,)
  gpu = speed.plans_of(parse("--preset", "gpu"))
  assert gpu[-1].shape == (1, 4, 65536, 64, "bfloat16")


def test_options_replace_those_of_the_preset():
  options = "--preset cpu --lengths 256 64 256 4096 --methods asap softmax".split()
  plans = speed.plans_of(parse(*options, "--slices", "4", "--dtype", "float16"))
  shapes = [plan.shape for plan in plans]
  assert [shape[:3] for shape in shapes] == [(16, 8, 64), (4, 8, 256), (1, 8, 4096)]
  assert {shape.dtype for shape in shapes} == {"float16"}
  assert {plan.methods for plan in plans} == {("asap", "softmax")}
  assert {plan.slices for plan in plans} == {(4,)}
  (plan,) = speed.plans_of(parse(*"--lengths 64 --batch 3 --heads 5".split()))
  assert plan.shape[:3] == (3, 5, 64)


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("--methods sofmax", "invalid choice: 'sofmax' .*softmax"),
    ("--preset tpu", "invalid choice: 'tpu' .*cpu"),
    ("--dtype int8", "invalid choice: 'int8' .*bfloat16"),
    ("--lengths 64 1", "--lengths: '1': expected an integer from 2 up"),
    ("--lengths 1e3", "--lengths: '1e3': expected an integer from 2 up"),
    ("--repeats 2", "--repeats: '2': expected an integer from 3 up"),
    ("--slices 0", "--slices: '0': expected an integer from 1 up"),
  ],
)
def test_options_that_make_no_sense_are_refused(option, message, capsys, tmp_path):
  with pytest.raises(SystemExit):
    speed.main(["--out", str(tmp_path / "new"), *option.split()])
  assert re.search(message, capsys.readouterr().err)


def problem_of(shape=SHAPE, slices=(2,), iterations=3):
  return make_problem(shape, slices, iterations, seed=0)


def logits_of(problem):
  query, key, value = (np.asarray(x, np.float64) for x in problem.inputs)
  return np.einsum("bnhd,bmhd->bhnm", query, key) / math.sqrt(query.shape[-1]), value


def attended(problem, duals_of):
  """Float64 attention `[batch, n, heads, dim]` from duals of each head's logits."""
  logits, value = logits_of(problem)
  out = np.zeros(value.shape)
  for b, h in np.ndindex(logits.shape[:2]):
    weights = oracles.plan(logits[b, h], *duals_of(b, h, logits[b, h]))
    out[b, :, h] = weights @ value[b, :, h]
  return out


@pytest.mark.parametrize("block", [1, 72, 2**20])  # a head, two, all
def test_blocked_softmax_against_float64(block, monkeypatch):
  monkeypatch.setattr(speed_attentions, "_BLOCK", block)
  problem = problem_of()
  logits, value = logits_of(problem)
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = np.einsum("bhnm,bmhd->bnhd", weights, value)
  actual = jax.jit(speed_attentions.blocked_softmax)(*problem.inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_blocked_softmax_keeps_the_dtype():
  problem = problem_of(SHAPE._replace(dtype="bfloat16"))
  assert speed_attentions.blocked_softmax(*problem.inputs).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["log_sinkhorn", "unrolled_sinkhorn"])
def test_sinkhorn_yardsticks_against_float64(name):
  problem = problem_of()
  zeros = np.zeros(SHAPE.length)
  expected = attended(problem, lambda b, h, logits: oracles.closures(logits, zeros, 3))
  function = jax.jit(getattr(speed_attentions, name), static_argnames="iterations")
  actual = function(*problem.inputs, iterations=3)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_training_steps_against_finite_differences():
  problem = problem_of(Shape(1, 1, 5, 3, "float32"))
  zeros = np.zeros(5)

  def loss(query):
    moved = problem._replace(inputs=(query, *problem.inputs[1:]))
    out = attended(moved, lambda b, h, logits: oracles.closures(logits, zeros, 3))
    return np.mean(out**2)

  expected = oracles.gradient(loss, problem.inputs[0])
  steps = candidates(problem, ["sinkhorn_step"])
  assert [step.implementation for step in steps] == ["ott", "ott_unrolled"]
  for step in steps:
    value, slopes = jax.jit(step.function)(*problem.inputs)
    assert value == pytest.approx(loss(problem.inputs[0]), rel=1e-4)
    assert len(slopes) == 3
    np.testing.assert_allclose(slopes[0], expected, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 8])
def test_random_dual_maps_are_of_the_logits_size(hidden):
  problem = problem_of(SHAPE._replace(length=32, head_dim=8))
  dual_map = speed_problem.random_dual_map(problem, 2, hidden)
  assert (dual_map.network is not None) == bool(hidden)
  assert dual_map.features == asap_jax.dual_map.features.KINDS
  (features,) = candidates(problem, ["features"])
  f = jax.jit(features.function)(*problem.inputs, dual_map)
  assert f.shape == (2, 2, 32)
  assert np.all((np.std(f, -1) > 0.1) & (np.std(f, -1) < 3.0))


def test_asap_is_the_closure_of_its_dual_map():
  problem = problem_of(slices=(2, 3))
  found = candidates(problem, ["asap", "asap_linear"])
  found = [candidate for candidate in found if candidate.implementation == "xla"]
  assert [candidate.slices for candidate in found] == [2, 3, 2]
  (features,) = candidates(problem, ["features"])
  for candidate in found[::2]:
    arguments = *problem.inputs, *candidate.arguments
    f = np.asarray(jax.jit(features.function)(*arguments))
    expected = attended(
      problem, lambda b, h, logits, f=f: oracles.closures(logits, f[b, h], 1)
    )
    actual = jax.jit(candidate.function)(*arguments)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["lot", "est"])  # a module, a function
def test_peers_are_those_of_the_experiments(name):
  problem = problem_of()
  (candidate,) = candidates(problem, [name])
  actual = jax.jit(candidate.function)(*problem.inputs, *candidate.arguments)
  expected = build_attention(name, heads=2, dim=4, layer=1, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(actual, expected(*problem.inputs), atol=1e-5)


def test_peers_that_cannot_have_a_shape_say_why():
  problem = problem_of(SHAPE._replace(head_dim=3))
  reasons = {c.method: c.unavailable for c in candidates(problem, PEERS)}
  assert reasons.pop("differential") == "dim=3: expected an even number"
  assert set(reasons.values()) == {None}


def test_methods_that_cannot_run_here_say_why(monkeypatch):
  monkeypatch.setitem(sys.modules, "ott", None)
  problem = problem_of()
  reasons = {
    (c.method, c.implementation): c.unavailable
    for c in candidates(problem, ["softmax", "sinkhorn", "sinkhorn_step"])
  }
  assert reasons["sinkhorn", "ott"] == "OTT-JAX is not installed"
  assert reasons["sinkhorn_step", "ott_unrolled"] == "OTT-JAX is not installed"
  assert reasons["sinkhorn", "log"] is None
  on_gpu = problem._replace(device="gpu")
  for given, reason in (
    (problem, "cuDNN needs a GPU, and this is a cpu"),
    (on_gpu, "cuDNN takes bfloat16 or float16, not float32"),
    (on_gpu._replace(shape=SHAPE._replace(dtype="bfloat16")), None),
  ):
    (cudnn,) = (c for c in candidates(given, ["softmax"]) if c[1] == "cudnn")
    assert cudnn.unavailable == reason


def test_unknown_methods_are_refused():
  with pytest.raises(ValueError, match=r"methods=\['sofmax'\]: expected some of"):
    candidates(problem_of(), ["softmax", "sofmax"])


def test_nothing_but_jax_and_the_package_is_needed():
  code = """
import sys
sys.modules.update(dict.fromkeys(("ott", "jaxopt", "lineax", "matplotlib", "sklearn")))
from experiments.speed import __main__, display
import pathlib
assert display.draw([], pathlib.Path("none.png")) == []
"""
  out = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=-1)
  assert b"Matplotlib is not installed: no figures" in out.stdout


def test_the_command_from_end_to_end(tmp_path, capsys):
  out = tmp_path / "out"
  speed.main(
    [
      *("--out", str(out), "--preset", "cpu", "--lengths", "16", "32"),
      *("--batch", "2", "--heads", "2", "--head-dim", "8", "--slices", "2", "1"),
      *("--iterations", "2", "--repeats", "3", "--dense-gib", "1e-4"),
      *("--methods", "softmax", "potentials", "sinkhorn_step"),
    ]
  )
  results = json.loads((out / "results.json").read_text())
  assert results["experiment"] == "speed"
  rows = results["rows"]
  expected = [
    ("softmax", "xla"),
    ("softmax", "xla_blocked"),
    ("softmax", "jax_nn"),
    ("potentials", "xla"),
    ("sinkhorn_step", "ott"),
    ("sinkhorn_step", "ott_unrolled"),  # at 32 over --dense-gib
  ]
  found = [(row["length"], row["method"], row["implementation"]) for row in rows]
  assert found == [(16, *name) for name in expected] + [
    (32, *name) for name in expected[:-1]
  ]
  for row in rows:
    assert row["batch"] == row["heads"] == 2
    assert (row["head_dim"], row["dtype"]) == (8, "float32")
    assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert row["repeats"] == 3
    assert isinstance(row["temp_bytes"], int)
    assert ("slices" in row) == (row["method"] == "potentials")
    assert ("ratio_to_softmax" in row) == (row["method"] != "sinkhorn_step")
  ratios = [row["ratio_to_softmax"] for row in rows if row["method"] == "softmax"]
  assert min(ratios[:3]) == min(ratios[3:]) == 1.0
  printed = capsys.readouterr().out
  skipped = results["config"]["skipped"]
  assert len(skipped) == 3
  assert all(reason in printed for reason in skipped)
  assert "at 2 x 2 x 16: softmax cudnn: cuDNN needs a GPU" in skipped[0]
  assert "at 2 x 2 x 32: sinkhorn_step ott_unrolled: n x m matrices" in skipped[2]
  assert "exponent" in printed
  assert (out / "scaling.png").stat().st_size > 10_000


def test_what_cannot_be_traced_is_left_out_with_its_reason():
  shape = SHAPE._replace(dtype="bfloat16", head_dim=8)
  problem = problem_of(shape)._replace(device="gpu")  # where there is none
  args = parse("--dense-gib", "0")
  rows, reasons, _ = speed.measure(problem, ["softmax"], args)
  assert rows == []
  (of_dense,) = (reason for reason in reasons if "n x m matrices" in reason)
  assert "softmax xla, softmax jax_nn: " in of_dense
  (of_cudnn,) = (reason for reason in reasons if "softmax cudnn" in reason)
  assert of_cudnn.startswith("skipped at 2 x 2 x 6: ")


def test_nothing_timed_is_an_error(tmp_path):
  options = "--lengths 16 --heads 2 --methods sinkhorn_step --dense-gib 0".split()
  with pytest.raises(SystemExit, match="Nothing could be timed"):
    speed.main(["--out", str(tmp_path / "out"), *options])
