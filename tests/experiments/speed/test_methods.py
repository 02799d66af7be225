"""Attentions that are timed against float64, and reasons why others are not."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracles

import asap_jax
from experiments.common.attentions import build_attention
from experiments.speed import attentions
from experiments.speed.methods import PEERS, candidates
from experiments.speed.problem import Shape, make_problem, random_dual_map

SHAPE = Shape(batch=2, heads=2, length=6, head_dim=4, dtype="float32")


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
  monkeypatch.setattr(attentions, "_BLOCK", block)
  problem = problem_of()
  logits, value = logits_of(problem)
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = np.einsum("bhnm,bmhd->bnhd", weights, value)
  actual = jax.jit(attentions.blocked_softmax)(*problem.inputs)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_blocked_softmax_keeps_the_dtype():
  problem = problem_of(SHAPE._replace(dtype="bfloat16"))
  assert attentions.blocked_softmax(*problem.inputs).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["log_sinkhorn", "unrolled_sinkhorn"])
def test_sinkhorn_yardsticks_against_float64(name):
  problem = problem_of()
  zeros = np.zeros(SHAPE.length)
  expected = attended(problem, lambda b, h, logits: oracles.closures(logits, zeros, 3))
  function = jax.jit(getattr(attentions, name), static_argnames="iterations")
  actual = function(*problem.inputs, iterations=3)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def of_valid_tokens(problem):
  """Softmax and log-domain Sinkhorn of each sequence's valid tokens, in float64."""
  logits, value = logits_of(problem)
  softmax, sinkhorn = np.zeros((2, *value.shape))
  for b, h in np.ndindex(logits.shape[:2]):
    n = int(np.asarray(problem.mask)[b, 0].any(-1).sum())
    block, values = logits[b, h, :n, :n], value[b, :n, h]
    weights = np.exp(block) / np.exp(block).sum(-1, keepdims=True)
    softmax[b, :n, h] = weights @ values
    duals = oracles.closures(block, np.zeros(n), 3)
    sinkhorn[b, :n, h] = oracles.plan(block, *duals) @ values
  return {"softmax": softmax, "sinkhorn": sinkhorn}


def test_padded_attentions_see_valid_tokens_alone():
  problem = problem_of(SHAPE._replace(batch=3, length=8, padded=True))
  assert problem.mask[:, 0].any(-1).sum(-1).tolist() == [2, 5, 8]
  wanted = of_valid_tokens(problem)
  valid = attentions.valid_tokens(problem.mask)[..., None, None]
  compared = []
  for candidate in candidates(problem, ["softmax", "sinkhorn"]):
    if candidate.implementation != "cudnn":
      out = jax.jit(candidate.function)(*problem.inputs, mask=problem.mask)
      found = jnp.where(valid, out, 0.0)  # of padding, jax.nn makes something
      np.testing.assert_allclose(found, wanted[candidate.method], atol=1e-5)
      compared.append(candidate.implementation)
  assert compared == ["xla", "xla_blocked", "jax_nn", "ott", "log", "xla", "chunked"]


@pytest.mark.parametrize("name", ["potentials", "features"])
def test_padded_parts_leave_padding_out(name):
  problem = problem_of(SHAPE._replace(batch=3, length=8, padded=True))
  (part,) = candidates(problem, [name])
  found = part.function(*problem.inputs, *part.arguments, mask=problem.mask)
  if name == "potentials":
    found, _ = found  # beside them, projections of all queries
  absent = ~np.asarray(attentions.valid_tokens(problem.mask))
  for leaf in jax.tree.leaves(found):
    points = np.moveaxis(np.asarray(leaf), -1, 1)
    assert not points[absent].any()
    assert points[~absent].any()


def test_training_steps_against_finite_differences():
  problem = problem_of(Shape(1, 1, 5, 3, "float32"))
  zeros = np.zeros(5)

  def loss(query):
    moved = problem._replace(inputs=(query, *problem.inputs[1:]))
    out = attended(moved, lambda b, h, logits: oracles.closures(logits, zeros, 3))
    return np.mean(out**2)

  expected = oracles.gradient(loss, problem.inputs[0])
  steps = candidates(problem, ["sinkhorn_step"])
  names = [step.implementation for step in steps if step.unavailable is None]
  assert names == ["xla", "chunked", "ott", "ott_unrolled"]
  for step in steps:
    if step.unavailable is not None:
      continue
    value, slopes = jax.jit(step.function)(*problem.inputs)
    assert value == pytest.approx(loss(problem.inputs[0]), rel=1e-4)
    assert len(slopes) == 3
    np.testing.assert_allclose(slopes[0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [0, 8])
def test_random_dual_maps_are_of_the_logits_size(hidden):
  problem = problem_of(SHAPE._replace(length=32, head_dim=8))
  dual_map = random_dual_map(problem, 2, hidden)
  assert (dual_map.network is not None) == bool(hidden)
  assert dual_map.features == asap_jax.dual_map.features.COMPILED
  (features,) = candidates(problem, ["features"])
  f = jax.jit(features.function)(*problem.inputs, dual_map)
  assert f.shape == (2, 2, 32)
  assert np.all((np.std(f, -1) > 0.1) & (np.std(f, -1) < 3.0))


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_kernels_for_a_tpu_are_timed_on_a_tpu_alone():
  methods = ["asap", "sinkhorn", "sinkhorn@2", "sinkhorn_step"]
  problem = problem_of()
  for device, wanted in (("cpu", set()), ("gpu", set()), ("tpu", set(methods))):
    each = candidates(problem._replace(device=device), methods)
    assert {c.method for c in each if c.implementation == "pallas"} == wanted


def test_unknown_methods_are_refused():
  with pytest.raises(ValueError, match=r"methods=\['sofmax'\]: expected some of"):
    candidates(problem_of(), ["softmax", "sofmax"])
