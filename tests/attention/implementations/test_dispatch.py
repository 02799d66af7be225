"""One harness for all implementations of the fused attention, and the choice of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import references
from helpers.fused_stand_in import fused

from asap_jax import AsapAttention, DualMap, asap_attention, sinkhorn_attention
from asap_jax.attention.implementations import (
  choice,
  chunked,
  cudnn_sums,
  dispatch,
  pallas_resident,
  xla_short,
)
from asap_jax.attention.implementations import iterated as iterated_module
from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.cudnn import cudnn_attention
from asap_jax.attention.implementations.iterated import iterated_attention
from asap_jax.attention.implementations.pallas import pallas_attention
from asap_jax.attention.implementations.xla import scaled_attention
from asap_jax.c_transform import apply_plan, closures

BATCH, HEADS, N, M, DIM, VALUES = 4, 2, 10, 13, 4, 3
RANDOM = np.random.default_rng(0)
# A power of two, so that scaling rounds nothing.
SCALE = 0.5
SHAPES = ((N, DIM), (M, DIM), (M, VALUES), (N,), (N, VALUES))
# The last is a dual of the queries; DUALS has those of both sides.
*INPUTS, COTANGENT = (
  jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, *shape)), jnp.float32)
  for shape in SHAPES
)
DUALS = {
  "query": INPUTS[3],
  "key": jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, M)), jnp.float32),
}
QUERY_MASK = (jnp.arange(N) < jnp.asarray([7, 10, 8, 9])[:, None])[:, None]
# Holes, not only suffixes.
KEY_MASK = jnp.asarray(RANDOM.random((BATCH, 1, M)) < 0.7)
OMEGA = jnp.asarray([[1.5], [0.8]])
FACTORS = {
  "relaxation": jnp.asarray([[1.5, 0.9, 1.2], [0.8, 1.3, 1.1]]),
  "momentum": jnp.asarray([[0.4, 0.5, -0.3], [0.1, 0.2, 0.6]]),
}
DUAL_MAP = DualMap(
  *(
    jnp.asarray(RANDOM.normal(size=(HEADS, *shape)), jnp.float32)
    for shape in ((2, DIM), (2 + DIM + 2,))
  )
)
MASKS = QUERY_MASK, KEY_MASK
CASES = {
  "plain": (1, (), {}),
  "masked": (2, MASKS, {"relaxation": OMEGA}),
  "momentum": (4, MASKS, FACTORS),
  "half": (0, MASKS, {"side": "key"}),
  "key": (1, MASKS, {"side": "key"}),
  "key momentum": (
    3, MASKS, {"side": "key"} | {k: x[:, 1:] for k, x in FACTORS.items()}
  ),
}  # fmt: skip
SIDES = list(CASES)[2:]
CASES["iterations"] = 2, MASKS, {}


def wide(query, key, *rest, scale, **options):
  query, key = (x.astype(jnp.float32) for x in (query, key))
  return scaled_attention(scale * query, key, *rest, **options)


def iterated(query, key, *rest, scale, **options):
  query, key = (x.astype(jnp.float32) for x in (query, key))
  return iterated_attention(scale * query, key, *rest, **options)


def kernels(query, key, *rest, scale, **options):
  query, key = (x.astype(jnp.float32) for x in (query, key))
  return pallas_attention(scale * query, key, *rest, **options)


def narrow(query, *rest, scale, **options):
  return chunked_attention(scale * query, *rest, **options)


def plain(query, key, value, f, count, *masks, scale, **options):
  logits = jnp.einsum("...nd,...md->...nm", scale * query, key)
  return apply_plan(
    logits, closures(logits, f, count, *masks, **options), value, *masks
  )


on_cpu = functools.partial(cudnn_attention, fused=fused)
# Budgets such that pairs of batch elements, or single heads, are worked off one after
# another, and each in chunks of four points (13 = 4 + 4 + 4 + 1).
BUDGETS = {"pairs": 2 * HEADS * M * 4, "heads": 1}
PROGRAMS = {
  "closures": (plain, jnp.float32, "masked"),
  "xla float32": (wide, jnp.float32, "plain"),
  "xla long": (wide, jnp.float32, "masked"),
  "xla bfloat16": (wide, jnp.bfloat16, "masked"),
  "iterated float32": (iterated, jnp.float32, "plain"),
  "iterated bfloat16": (iterated, jnp.bfloat16, "iterations"),
  "iterated blocks": (iterated, jnp.float32, "iterations"),
  "chunked float32": (narrow, jnp.float32, "plain"),
  "chunked bfloat16": (narrow, jnp.bfloat16, "masked"),
  "chunked pairs": (narrow, jnp.float32, "masked"),
  "chunked heads": (narrow, jnp.float32, "masked"),
  "cudnn bfloat16": (on_cpu, jnp.bfloat16, "plain"),
  "cudnn masked": (on_cpu, jnp.bfloat16, "masked"),
  "cudnn float16": (on_cpu, jnp.float16, "masked"),
  "pallas float32": (kernels, jnp.float32, "plain"),
  "pallas bfloat16": (kernels, jnp.bfloat16, "iterations"),
  "pallas float16": (kernels, jnp.float16, "iterations"),
  "pallas masked": (kernels, jnp.float32, "masked"),
  "pallas streamed bfloat16": (kernels, jnp.bfloat16, "plain"),
  "pallas streamed iterations": (kernels, jnp.float32, "iterations"),
  **{
    f"{name} {case}": (function, dtype, case)
    for name, (function, dtype) in {
      "closures": (plain, jnp.float32),
      "xla": (wide, jnp.float32),
      "xla long": (wide, jnp.float32),
      "chunked heads": (narrow, jnp.float32),
      "pallas": (kernels, jnp.float32),
      # The gradients that several closures leave are as small as bfloat16's rounding.
      "cudnn": (on_cpu, jnp.float16),
    }.items()
    for case in SIDES
  },
  "gpu plain": (cudnn_attention, jnp.bfloat16, "plain"),
  "gpu masked": (cudnn_attention, jnp.bfloat16, "masked"),
  "gpu float16": (cudnn_attention, jnp.float16, "masked"),
  "gpu momentum": (cudnn_attention, jnp.float16, "momentum"),
  "gpu half": (cudnn_attention, jnp.bfloat16, "half"),
}
gpu = [
  pytest.mark.gpu,
  pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]
# Of what differs little from others; and kernels that are interpreted, which takes
# long: see test_pallas.
SLOW = [
  f"{name} {case}"
  for name in ("closures", "xla", "xla long", "chunked heads", "cudnn")
  for case in ("momentum", "half", "key", "key momentum")
  if (name, case)
  not in {
    ("xla", "half"),
    ("xla", "key momentum"),
    ("xla long", "momentum"),
    ("chunked heads", "key momentum"),
    ("cudnn", "half"),
  }
] + [name for name in PROGRAMS if name.startswith("pallas ")]


def each_of(names):
  def marks(name):
    slow = [pytest.mark.slow] if name in SLOW else []
    return gpu if name.startswith("gpu") else slow

  return pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in names]
  )


everyone = each_of(PROGRAMS)
PALLAS = pytest.param("pallas", marks=pytest.mark.slow)


@functools.cache
def program(name):
  """Output and gradients of one implementation, compiled once."""
  function, _, case = PROGRAMS[name]
  count, masks, options = CASES[case]

  @jax.jit
  def run(*inputs):
    def loss(*inputs):
      out = function(*inputs, count, *masks, scale=SCALE, **options)
      return jnp.vdot(COTANGENT, out.astype(jnp.float32)), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)
    return out, gradients

  with pytest.MonkeyPatch.context() as patch:
    # Fewer points of reference than points.
    patch.setattr(cudnn_sums, "_REFERENCES", 4)
    patch.setattr(chunked, "_LEAST_CHUNK", 4)
    budgets = [BUDGETS[word] for word in name.split() if word in BUDGETS]
    patch.setattr(chunked, "_CPU_BUDGET", *budgets or [2**20])
    if "streamed" in name:
      patch.setattr(pallas_resident, "_LENGTH", 0)
    if "blocks" in name:
      patch.setattr(iterated_module, "_PAIRS", 2 * N * M)
    if "long" in name:
      patch.setattr(xla_short, "_SHORT", 0)
    return run.lower(*given(name)).compile()


def given(name, padding=0.0):
  """Inputs in the dtype of a program, with something in the padding."""
  _, dtype, case = PROGRAMS[name]
  inputs = [x.astype(dtype) for x in INPUTS[:3]]
  if case != "plain":
    masks = QUERY_MASK, KEY_MASK, KEY_MASK
    inputs = [
      jnp.where(mask[..., None], x, padding).astype(dtype)
      for x, mask in zip(inputs, masks, strict=True)
    ]
  return *inputs, DUALS[CASES[case][2].get("side", "query")]


def expected(name, inputs):
  count, masks, options = CASES[PROGRAMS[name][2]]
  query, *rest = (np.float64(x) for x in inputs)
  return references.closed_values(SCALE * query, *rest, count, *masks, **options)


@everyone
def test_values_against_float64(name):
  inputs = given(name)
  out, _ = program(name)(*inputs)
  assert out.dtype == PROGRAMS[name][1]
  # Rows of weights sum to one: an error of the duals or of rounding, times the values.
  tolerance = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 2e-2}[str(out.dtype)]
  out = np.float64(out)
  np.testing.assert_allclose(out, expected(name, inputs), atol=tolerance)
  if PROGRAMS[name][2] != "plain":
    absent = ~np.asarray(jnp.broadcast_to(QUERY_MASK, out.shape[:-1]))
    np.testing.assert_array_equal(out[absent], 0)


@everyone
def test_gradients_against_float64(name):
  inputs = given(name)
  _, slopes = program(name)(*inputs)
  tolerance = {"float32": 1e-4}.get(str(inputs[0].dtype), 2e-2)
  for place, slope in enumerate(slopes):
    tangent = np.random.default_rng(place).normal(size=slope.shape)
    assert slope.dtype == inputs[place].dtype

    def moved(step, place=place, tangent=tangent):
      points = [np.float64(x) for x in inputs]
      points[place] += step * tangent
      return np.vdot(COTANGENT, expected(name, points))

    wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
    size = np.linalg.norm(np.float64(slope))
    assert size > 0.1
    actual = np.vdot(np.float64(slope), tangent)
    np.testing.assert_allclose(actual, wanted, atol=tolerance * size)


@everyone
def test_twice_gives_the_same_bits(name):
  first, second = (program(name)(*given(name)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, second)


@each_of(
  name
  for name, (*_, case) in PROGRAMS.items()
  if case != "plain" and not name.startswith(("xla", "closures"))
)
def test_padding_that_is_not_finite_reaches_nothing(name):
  clean, dirty = (program(name)(*given(name, padding)) for padding in (0.0, jnp.nan))
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.usefixtures("unchecked")
def test_unknown_names_are_refused():
  query = jnp.zeros((1, N, HEADS, DIM))
  wanted = r"implementation='flash': expected .*xla.*chunked.*cudnn.*pallas"
  with pytest.raises(ValueError, match=wanted):
    asap_attention(query, query, query, dual_map=DUAL_MAP, implementation="flash")
  with pytest.raises(ValueError, match=wanted):
    sinkhorn_attention(query, query, query, implementation="flash")


@pytest.fixture
def cudnn_stand_in(on_gpu, monkeypatch):
  monkeypatch.setattr(choice, "_CUDNN_LENGTH", 8)
  monkeypatch.setattr(dispatch, "cudnn_attention", on_cpu)


def tokens(dtype=jnp.bfloat16):
  """Inputs of an attention function, two sequences, their mask and masks."""
  query, key, value = (jnp.moveaxis(x[:2], 1, 2).astype(dtype) for x in INPUTS[:3])
  masks = QUERY_MASK[:2, 0], KEY_MASK[:2, 0]
  named = dict(zip(("query_mask", "key_mask"), map(np.asarray, masks), strict=True))
  return (query, key, value), nnx.make_attention_mask(*masks), named


OPTIONS = {"scale": 0.7, "epsilon": 0.5}


@pytest.mark.usefixtures("cudnn_stand_in")
@pytest.mark.parametrize("name", ["xla", "chunked", "cudnn", "pallas", None])
def test_asap_attention_by_every_implementation(name):
  inputs, mask, masks = tokens()
  wanted, _ = references.attention(
    *(np.float64(x) for x in inputs), 1, dual_map=DUAL_MAP, **OPTIONS, **masks
  )
  attend = functools.partial(
    asap_attention, dual_map=DUAL_MAP, implementation=name, **OPTIONS
  )
  out = jax.jit(lambda *inputs: attend(*inputs, mask=mask))(*inputs)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(out), wanted, atol=2e-2)


@pytest.mark.usefixtures("cudnn_stand_in")
@pytest.mark.parametrize("name", ["xla", "chunked", "cudnn", PALLAS])
def test_sinkhorn_attention_by_every_implementation(name):
  inputs, mask, masks = tokens()
  wanted, _ = references.attention(*(np.float64(x) for x in inputs), 4, **masks)
  attend = functools.partial(sinkhorn_attention, iterations=4, implementation=name)
  out = jax.jit(lambda *inputs: attend(*inputs, mask=mask))(*inputs)
  np.testing.assert_allclose(np.float64(out), wanted, atol=2e-2)


@pytest.mark.usefixtures("cudnn_stand_in")
@pytest.mark.parametrize("name", [None, "cudnn"])
def test_whatever_runs_forward_the_iterations_have_one_gradient(name, monkeypatch):
  """By default, and by name, cuDNN forward, but never its gradient."""
  inputs, mask, _ = tokens()

  def without_gradient(query, key, value, dual, count, *masks, **options):
    @jax.custom_jvp
    def run(*arrays):
      return on_cpu(*arrays, count, *masks, **options)

    @run.defjvp
    def refuse(primals, tangents):
      raise AssertionError("differentiated")

    return run(query, key, value, dual)

  monkeypatch.setattr(dispatch, "cudnn_attention", without_gradient)

  def step(name):
    attend = functools.partial(
      sinkhorn_attention, iterations=3, implementation=name, mask=mask
    )
    loss = lambda *x: jnp.square(attend(*x).astype(jnp.float32)).sum()  # noqa: E731
    return jax.jit(lambda *x: (attend(*x), jax.grad(loss, (0, 1, 2))(*x)))(*inputs)

  (out, slopes), (own, wanted) = step(name), step("xla")
  assert not np.array_equal(out, own)
  np.testing.assert_allclose(np.float64(out), np.float64(own), atol=2e-2)
  for slope, other in zip(slopes, wanted, strict=True):
    largest = float(jnp.abs(other).max())
    np.testing.assert_allclose(
      np.float64(slope), np.float64(other), atol=2e-2 * largest
    )


class Called(Exception):
  """An implementation was reached."""


@pytest.fixture
def marked(monkeypatch):
  def raises(*arguments, **options):
    raise Called

  monkeypatch.setattr(dispatch, "chunked_attention", raises)


@pytest.mark.usefixtures("marked")
def test_layer_takes_an_implementation_and_a_call_may_replace_it():
  inputs, *_ = tokens(jnp.float32)
  attend = AsapAttention(DUAL_MAP, implementation="chunked")
  with pytest.raises(Called):
    jax.eval_shape(attend, *inputs)
  options = {"implementation": "chunked"}
  with pytest.raises(Called):
    jax.eval_shape(AsapAttention(DUAL_MAP, options), *inputs)
  out = jax.jit(lambda *inputs: attend(*inputs, implementation="xla"))(*inputs)
  wanted = jax.jit(AsapAttention(DUAL_MAP).__call__)(*inputs)
  np.testing.assert_array_equal(out, wanted)
  layer = nnx.MultiHeadAttention(
    HEADS, HEADS * DIM, decode=False, attention_fn=attend, rngs=nnx.Rngs(0)
  )
  with pytest.raises(Called):
    nnx.jit(lambda layer, x: layer(x))(layer, jnp.ones((1, N, HEADS * DIM)))


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("name", ["chunked", "cudnn", PALLAS])
def test_weights_that_are_asked_for_are_formed_whatever_is_named(name):
  inputs, mask, masks = tokens(jnp.float32)
  _, wanted = references.attention(*inputs, 1, dual_map=DUAL_MAP, **masks)
  sown = []

  class Module:
    def sow(self, kind, name, value):
      sown.append(value)

  def attend(*inputs):
    options = {"dual_map": DUAL_MAP, "implementation": name}
    return asap_attention(*inputs, mask=mask, module=Module(), **options), sown[0]

  _, weights = jax.jit(attend)(*inputs)
  np.testing.assert_allclose(weights, wanted, atol=2e-5)
