"""Shapes and methods of the presets."""

from experiments.speed.__main__ import parse
from experiments.speed.methods import METHODS, PEERS
from experiments.speed.plans import FULL_ONLY, plans_of


def test_presets_try_less_on_brief_shapes():
  cpu, gpu = (
    plans_of(parse(["--out", "new", "--preset", name])) for name in ("cpu", "gpu")
  )
  plans = {plan.shape.length: plan for plan in cpu}
  assert list(plans) == sorted(plans)
  assert plans[1024].shape == (1, 8, 1024, 64, "float32", False)
  assert plans[128].shape == (8, 8, 128, 64, "float32", False)
  assert set(METHODS) - set(plans[1024].methods) == set(PEERS)
  assert plans[1024].slices == (8, 2, 4)
  assert set(METHODS) - set(plans[4096].methods) == {*PEERS, *FULL_ONLY}
  assert plans[4096].slices == (8,)
  assert gpu[-1].shape == (1, 4, 65536, 64, "bfloat16", False)


def test_options_replace_those_of_the_preset():
  options = "--out new --preset cpu --lengths 256 64 256 4096 --methods asap softmax"
  plans = plans_of(parse(f"{options} --slices 4 --dtype float16".split()))
  shapes = [plan.shape for plan in plans]
  assert [shape[:3] for shape in shapes] == [(16, 8, 64), (4, 8, 256), (1, 8, 4096)]
  assert {shape.dtype for shape in shapes} == {"float16"}
  assert {plan.methods for plan in plans} == {("asap", "softmax")}
  assert {plan.slices for plan in plans} == {(4,)}
  both = plans_of(parse("--out new --lengths 64 --padded --batch 2".split()))
  assert [plan.shape.padded for plan in both] == [False, True]
  (plan,) = plans_of(parse("--out new --lengths 64 --batch 3 --heads 5".split()))
  assert plan.shape[:3] == (3, 5, 64)
