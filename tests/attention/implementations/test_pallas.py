"""Kernels for a TPU, interpreted: several blocks, ranges, transformations.

See also test_dispatch, and what is compiled for TPUs in tests/experiments/accelerators.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lowered, references
from scipy.special import logsumexp

from asap_jax import sinkhorn_attention
from asap_jax.attention.implementations import pallas_resident, pallas_streamed
from asap_jax.attention.implementations.pallas import pallas_attention

BATCH, HEADS, N, M, DIM, VALUES = 1, 2, 150, 260, 8, 5
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY, KEY = normal(BATCH, HEADS, N, DIM), normal(BATCH, HEADS, M, DIM)
VALUE, F = normal(BATCH, HEADS, M, VALUES), normal(BATCH, HEADS, N)
COTANGENT = normal(BATCH, HEADS, N, VALUES)
MASSES = tuple(
  jnp.where(RANDOM.random((BATCH, 1, size)) < 0.8, jnp.abs(normal(size)) + 0.1, 0.0)
  for size in (N, M)
)


def logits(sharpness=1.0):
  return sharpness * np.float64(QUERY[0]) @ np.float64(KEY[0]).swapaxes(-1, -2)


@pytest.mark.parametrize(
  ("size", "wanted"), [(1, 128), (512, 512), (513, 384), (1025, 384), (16384, 512)]
)
def test_blocks_are_few_and_hold_little_padding(size, wanted):
  assert pallas_streamed.block_of(size) == wanted


def test_sums_in_several_blocks_against_float64(monkeypatch):
  monkeypatch.setattr(pallas_streamed, "_BLOCK", 128)
  # In the first block of sources nothing is present; what pads the last would weigh
  # more than all others if it were.
  dual = jnp.where(jnp.arange(M) < 130, -1e30, 40 * normal(HEADS, M) - 2000)
  given = 20 * QUERY[0], KEY[0], dual
  logs, out = jax.jit(pallas_streamed.averages)(*given, VALUE[0])
  scores = logits(20)[..., 130:] + np.float64(dual[:, None, 130:])
  wanted = logsumexp(scores, axis=-1)
  np.testing.assert_allclose(logs, wanted, rtol=1e-6)
  weights = np.exp(scores - wanted[..., None])
  np.testing.assert_allclose(out, weights @ np.float64(VALUE[0, :, 130:]), atol=1e-3)
  np.testing.assert_array_equal(jax.jit(pallas_streamed.log_sums)(*given), logs)


def slopes(query, f, count, weights):
  """Values and the gradient in all inputs, by jit."""

  @jax.jit
  def run(*inputs):
    def loss(*inputs):
      out = pallas_attention(*inputs, count, *weights)
      return jnp.vdot(COTANGENT, out), out

    return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*inputs)

  return run(query, KEY, VALUE, f)


@pytest.mark.parametrize(
  ("sharpness", "count", "is_resident"),
  [
    (1.0, 4, True),
    pytest.param(40.0, 5, True, marks=pytest.mark.slow),
    pytest.param(1.0, 4, False, marks=pytest.mark.slow),
    pytest.param(40.0, 5, False, marks=pytest.mark.slow),
  ],
)
def test_iterations_of_masses_against_float64(
  sharpness, count, is_resident, monkeypatch
):
  if not is_resident:
    monkeypatch.setattr(pallas_resident, "_LENGTH", 0)
    monkeypatch.setattr(pallas_streamed, "_BLOCK", 128)
  inputs = sharpness * QUERY, KEY, VALUE, sharpness * F
  gradients, out = slopes(inputs[0], inputs[3], count, MASSES)

  def expected(*inputs):
    return references.closed_values(*inputs, count, *MASSES)

  wanted = expected(*inputs)
  # Logits of 400 hold five digits of a hundredth.
  tolerance = 1e-5 * sharpness
  np.testing.assert_allclose(out, wanted, atol=tolerance)
  absent = np.broadcast_to(np.asarray(MASSES[0]) == 0, out.shape[:-1])
  np.testing.assert_array_equal(np.asarray(out)[absent], 0)
  for place, slope in enumerate(gradients):
    tangent = np.random.default_rng(place).normal(size=slope.shape)

    def moved(step, place=place, tangent=tangent):
      points = [np.float64(x) for x in inputs]
      points[place] += step * tangent
      return np.vdot(COTANGENT, expected(*points))

    finite = (moved(1e-6) - moved(-1e-6)) / 2e-6
    size = np.linalg.norm(np.float64(slope))
    assert size > 0.1
    np.testing.assert_allclose(
      np.vdot(np.float64(slope), tangent), finite, atol=10 * tolerance * size
    )


@pytest.mark.slow
def test_scalings_that_leave_their_range_are_begun_anew():
  # Their largest grows by a factor of 40 an iteration, from one.
  length, count = 128, 40
  x = jnp.linspace(0, 1, length)
  query = 100 * jnp.stack([jnp.ones(length), 20 * x], -1)
  key = jnp.stack([-10 * x**2, x**3], -1)
  value, f = VALUE[0, 0, :length], jnp.zeros(length)
  inputs = [each[None, None] for each in (query, key, value, f)]
  out = jax.jit(pallas_attention, static_argnums=4)(*inputs, count)
  wanted = references.closed_values(*inputs, count)
  np.testing.assert_allclose(out, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["queries", "keys"])
def test_a_sequence_without_points_is_zero(absent):
  sizes = {"queries": 0, "keys": 1}
  weights = [jnp.ones((BATCH, HEADS, size), bool) for size in (N, M)]
  weights[sizes[absent]] = weights[sizes[absent]].at[:, 1].set(False)
  gradients, out = slopes(QUERY, F, 2, weights)
  np.testing.assert_array_equal(out[:, 1], 0)
  assert np.abs(out[:, 0]).max() > 0
  for slope in gradients:
    assert jnp.isfinite(slope).all()
    np.testing.assert_array_equal(slope[:, 1], 0)


@pytest.mark.slow
def test_vmap_agrees_with_a_loop_also_where_one_side_is_shared():
  key, value, mask = KEY[0, 0], VALUE[0, 0], jnp.arange(M) < 100

  @functools.partial(jax.value_and_grad, has_aux=True)
  def slope(query, f):
    out = pallas_attention(query, key, value, f, 3, None, mask)
    return jnp.square(out).sum(), out

  mapped = jax.jit(jax.vmap(slope))(QUERY[0], F[0])
  one = jax.jit(slope)
  for index in range(HEADS):
    (_, out), gradient = one(QUERY[0, index], F[0, index])
    (_, outs), gradients = jax.tree.map(lambda x, i=index: x[i], mapped)
    np.testing.assert_allclose(outs, out, atol=1e-6)
    np.testing.assert_allclose(gradients, gradient, atol=1e-5)


SCRIPT = """
  import functools
  import jax
  import numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from asap_jax import sinkhorn_attention

  whole = functools.partial(sinkhorn_attention, iterations=3)
  attend = functools.partial(whole, implementation="pallas")
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = [jax.random.normal(key, (4, 6, 2, 4)) for key in keys]

  def slopes(function, tokens):
    loss = lambda *tokens: (function(*tokens) ** 2).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*tokens)

  wanted = slopes(whole, tokens)
  auto, explicit = (
    jax.make_mesh((2,), ("batch",), axis_types=(kind,))
    for kind in (AxisType.Auto, AxisType.Explicit)
  )
  spread = NamedSharding(explicit, P("batch"))
  mapped = jax.shard_map(
    attend, mesh=auto, in_specs=(P("batch"),) * 3, out_specs=P("batch")
  )
  for found in (
    slopes(mapped, tokens), slopes(attend, jax.device_put(tokens, spread))
  ):
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)
  print("same")
"""


@pytest.mark.slow
def test_devices_of_a_mesh_take_it_where_types_say_what_they_have():
  assert lowered.run_on_host_devices(2, SCRIPT) == ["same"]


def step(attend, *tokens):
  def loss(*tokens):
    return jnp.sum(jnp.square(attend(*tokens)))

  return jax.grad(loss, (0, 1, 2))(*tokens)


@pytest.mark.parametrize("length", [1000, 8000])
def test_for_a_tpu_it_is_kernels_and_elsewhere_what_they_mean(length):
  tokens = (jax.ShapeDtypeStruct((1, length, 2, DIM), jnp.float32),) * 3
  attend = functools.partial(sinkhorn_attention, iterations=3, implementation="pallas")
  forward = lowered.exported(attend, *tokens, platform="tpu")
  text = lowered.exported(functools.partial(step, attend), *tokens, platform="tpu")
  called = [each.count("@tpu_custom_call") for each in (forward, text)]
  resident = length <= 1024
  # One kernel each way; or both halves in a loop, the last g, and the values.
  assert called == ([1, 2] if resident else [4, 4])
  assert f"{length}x{length}" not in text + forward
  assert ("stablehlo.while" in forward) != resident
  elsewhere = lowered.exported(attend, *tokens, platform="cuda")
  assert "custom_call" not in elsewhere
  assert "stablehlo.while" in elsewhere


@pytest.mark.usefixtures("unchecked")
def test_what_the_kernels_do_not_take_is_refused():
  arguments = QUERY, KEY, VALUE, F
  wide = (np.float64(x) for x in arguments)
  with pytest.raises(ValueError, match=r"float64: kernels take float32"):
    pallas_attention(*wide)
  with pytest.raises(ValueError, match=r"bias: .*expected None"):
    pallas_attention(*arguments, bias=jnp.zeros((N, M)))
  with pytest.raises(ValueError, match="count=0"):
    pallas_attention(*arguments, 0)
  with pytest.raises(ValueError, match="momentum has shape"):
    pallas_attention(*arguments, 2, momentum=jnp.ones((HEADS, 2)))
  with pytest.raises(ValueError, match="key_weights has shape"):
    pallas_attention(*arguments, 1, None, jnp.ones((N,)))
  tokens = (jnp.zeros((1, 8, 2, 4)),) * 3
  attend = functools.partial(sinkhorn_attention, *tokens, implementation="pallas")
  with pytest.raises(ValueError, match="'pallas' cannot serve: bias"):
    attend(bias=jnp.zeros((8, 8)))
  with pytest.raises(ValueError, match="'pallas' cannot serve: packed sequences"):
    attend(segment_ids=jnp.ones((1, 8), int))
  with pytest.raises(ValueError, match=r"'pallas' with tolerance=0\.1"):
    attend(tolerance=0.1)
