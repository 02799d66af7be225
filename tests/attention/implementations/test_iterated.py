"""Sinkhorn's iterations with their exact gradient, against OTT-JAX's and float64.

In both forms: with kernels in blocks of heads, and in chunks of queries without one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

import asap_jax
from asap_jax.attention.implementations import streamed
from asap_jax.attention.implementations.iterated import (
  iterated_attention,
  iterated_plan,
)
from asap_jax.c_transform import apply_plan, closures

BATCH, N, M, HEADS, DIM = 2, 9, 7, 3, 4
RANDOM = np.random.default_rng(0)
QUERY, KEY, VALUE, COTANGENT = (
  jnp.asarray(RANDOM.normal(size=(BATCH, size, HEADS, DIM)), jnp.float32)
  for size in (N, M, M, N)
)
START = jnp.asarray(RANDOM.normal(size=(BATCH, HEADS, N)), jnp.float32)
BIAS = jnp.asarray(RANDOM.normal(size=(HEADS, N, M)), jnp.float32)
MASK = nnx.make_attention_mask(
  jnp.arange(N) < jnp.asarray([[9], [5]]), jnp.arange(M) < jnp.asarray([[4], [7]])
)
TOKENS = tuple(jnp.swapaxes(x, 1, 2) for x in (QUERY, KEY, VALUE))


@pytest.fixture(params=["iterated", "streamed"])
def attend(request, monkeypatch):
  if request.param == "iterated":
    return iterated_attention
  # Five chunks of two queries, the last with one that is not there, a head at a time.
  monkeypatch.setattr(streamed, "_CPU_LEAST_CHUNK", 2)
  monkeypatch.setattr(streamed, "_CPU_SCORES", 2 * M)
  return streamed.streamed_attention


def of_attention(**options):
  """Output and gradients of one attention, by all it is a function of."""

  @jax.jit
  def run(query, key, value, bias):
    def loss(*inputs):
      *tokens, bias = inputs
      out = asap_jax.sinkhorn_attention(*tokens, bias=bias, **options)
      return jnp.vdot(COTANGENT, out), out

    inputs = query, key, value, bias
    gradients, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*inputs)
    return out, *gradients

  return run


@pytest.mark.parametrize(
  ("iterations", "options"),
  [
    (20, {"mask": MASK}),
    pytest.param(20, {}, marks=pytest.mark.slow),
    pytest.param(1, {}, marks=pytest.mark.slow),
    pytest.param(3, {"start": "gaussian"}, marks=pytest.mark.slow),
    pytest.param(
      5, {"mask": MASK, "start": "gaussian_diagonal"}, marks=pytest.mark.slow
    ),
  ],
)
def test_values_and_gradients_are_those_of_ott(iterations, options):
  inputs = QUERY, KEY, VALUE, BIAS
  bound = options | {"iterations": iterations}
  found, wanted = (
    of_attention(**bound, implementation=name)(*inputs) for name in (None, "ott")
  )
  for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def in_float64(query, key, value, start, count, scale, cotangent, *masses):
  """Gradients of the log domain, wide enough for any logits."""
  with jax.enable_x64(True):
    query, key, value, start, cotangent, *masses = (
      jnp.asarray(np.float64(x)) for x in (query, key, value, start, cotangent, *masses)
    )

    def loss(query, key, value, start):
      logits = scale * jnp.einsum("...nd,...md->...nm", query, key)
      duals = closures(logits, start, count, *masses)
      return jnp.vdot(cotangent, apply_plan(logits, duals, value, *masses))

    slopes = jax.grad(loss, (0, 1, 2, 3))(query, key, value, start)
    return [np.asarray(x) for x in slopes]


# At 100 logits reach 600, far beyond the range of any one kernel.
@pytest.mark.parametrize("scale", [1.0, pytest.param(100.0, marks=pytest.mark.slow)])
def test_gradients_against_float64_also_of_sharp_logits(scale, attend):
  def loss(query, key, value, start):
    out = attend(scale * query, key, value, start, 6)
    return jnp.vdot(jnp.swapaxes(COTANGENT, 1, 2), out)

  found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*TOKENS, START)
  wanted = in_float64(*TOKENS, START, 6, scale, jnp.swapaxes(COTANGENT, 1, 2))
  for ours, exact in zip(found, wanted, strict=True):
    assert np.isfinite(ours).all()
    # Logits of 600 are rounded by 3e-5.
    np.testing.assert_allclose(ours, exact, atol=2e-5 * scale * np.abs(exact).max())


def test_gradients_from_a_start_far_from_the_last_dual(attend):
  start = 100.0 * START

  def loss(query, key, value, start):
    out = attend(query, key, value, start, 2)
    return jnp.vdot(jnp.swapaxes(COTANGENT, 1, 2), out)

  found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*TOKENS, start)
  wanted = in_float64(*TOKENS, start, 2, 1.0, jnp.swapaxes(COTANGENT, 1, 2))
  # Duals of 300 are rounded by 3e-5, and all cotangents pass through them.
  largest = max(np.abs(exact).max() for exact in wanted)
  for ours, exact in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, exact, atol=1e-4 * largest)


def test_gradients_where_duals_drift_beyond_the_range_of_scalings(attend):
  """Two groups that hardly see each other and whose masses do not balance.

  Every iteration moves the duals of one against those of the other by the logarithm of
  what is missing, here to a factor of exp(117) between the first and the last.
  """
  query = jnp.asarray([[25.0, 0.0, 0.3], [0.0, 25.0, -0.5], [0.0, 25.0, 0.4]])
  key = jnp.asarray([[1.0, 0.0, 1.0], [1.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
  value, cotangent, start = (x[0, 0, :3] for x in (TOKENS[2], TOKENS[0], START))
  masses = jnp.asarray([0.02, 0.49, 0.49]), jnp.asarray([0.49, 0.49, 0.02])

  def loss(query, key, value, start):
    out = attend(20 * query, key, value, start, 30, *masses)
    return jnp.vdot(cotangent, out)

  tokens = query, key, value, start
  found = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*tokens)
  wanted = in_float64(*tokens, 30, 20.0, cotangent, *masses)
  largest = max(np.abs(exact).max() for exact in wanted)
  for ours, exact in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, exact, atol=1e-3 * largest)


def test_near_and_far_in_one_batch_agree_with_each_alone(attend):
  """Blocks and branches change nothing: under vmap both are there."""
  starts = jnp.asarray([1.0, 100.0])[:, None, None] * START[0]
  tokens = [x[0] for x in TOKENS]

  def loss(start, *tokens):
    return jnp.vdot(jnp.swapaxes(COTANGENT, 1, 2)[0], attend(*tokens, start, 2))

  slope = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
  together = jax.vmap(slope, in_axes=(0, None, None, None))(starts, *tokens)
  for place, start in enumerate(starts):
    alone = slope(start, *tokens)
    size = max(np.abs(bar).max() for bar in alone)
    for one, other in zip(together, alone, strict=True):
      # Duals of 300 are rounded by 3e-5.
      np.testing.assert_allclose(one[place], other, atol=1e-4 * size)


def test_gradient_of_masses_against_finite_differences(attend):
  masses = [
    jnp.asarray(RANDOM.uniform(0.5, 1.5, size=(BATCH, HEADS, size)), jnp.float32)
    for size in (N, M)
  ]
  tangents = [RANDOM.normal(size=x.shape) for x in masses]

  @jax.jit
  def loss(*masses):
    out = attend(*TOKENS, START, 3, *masses)
    return jnp.vdot(jnp.swapaxes(COTANGENT, 1, 2), out)

  slopes = jax.jit(jax.grad(loss, (0, 1)))(*masses)
  for place, (slope, tangent) in enumerate(zip(slopes, tangents, strict=True)):
    ends = []
    for step in (1e-2, -1e-2):
      moved = list(masses)
      moved[place] = moved[place] + step * tangent
      ends.append(float(loss(*moved)))
    wanted = (ends[0] - ends[1]) / 2e-2
    np.testing.assert_allclose(np.vdot(slope, tangent), wanted, rtol=2e-2, atol=1e-2)


def test_weights_that_are_formed_have_the_same_gradient():
  """As for dropout and where they are sown."""
  masks = [MASK.any(-1), MASK.any(-2)]

  def formed(query):
    logits = jnp.einsum("...nd,...md->...nm", query, TOKENS[1])
    return iterated_plan(logits, START, 4, *masks) @ TOKENS[2]

  def unformed(query):
    return iterated_attention(query, *TOKENS[1:], START, 4, *masks)

  cotangent = jnp.swapaxes(COTANGENT, 1, 2)
  found, wanted = (
    jax.jit(jax.grad(lambda x, f=f: jnp.vdot(cotangent, f(x))))(TOKENS[0])
    for f in (formed, unformed)
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.vmap], ids=["remat", "vmap"])
def test_under_transformations(transform, attend):
  def iterate(*inputs):
    return attend(*inputs, 4)

  inputs = *TOKENS, START
  plain, changed = (
    jax.jit(jax.grad(lambda *x, f=f: jnp.square(f(*x)).sum(), (0, 1, 2, 3)))(*inputs)
    for f in (iterate, transform(iterate))
  )
  for one, other in zip(plain, changed, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_matrix_of_pairs_is_kept_for_the_backward_pass(attend):
  length, iterations = 64, 5
  tokens = jax.ShapeDtypeStruct((1, 2, length, 4), jnp.float32)
  start = jax.ShapeDtypeStruct((1, 2, length), jnp.float32)

  def backward(*inputs):
    return jax.vjp(lambda *x: attend(*x, iterations), *inputs)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, tokens, tokens, tokens, start))
  sizes = sorted(np.prod(x.shape) for x in kept)
  assert sizes[-1] <= 2 * length * max(4, iterations)


def test_without_a_kernel_values_and_gradients_are_those_with_one(monkeypatch):
  monkeypatch.setattr(streamed, "_CPU_LEAST_CHUNK", 2)
  monkeypatch.setattr(streamed, "_CPU_SCORES", 2 * HEADS * M)
  masks = [MASK.any(-1), MASK.any(-2)]

  def run(attend):
    def loss(*inputs):
      out = attend(*inputs, 20, *masks)
      return jnp.vdot(jnp.swapaxes(COTANGENT, 1, 2), out), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*TOKENS, START)
    return out, *gradients

  for one, other in zip(
    run(streamed.streamed_attention), run(iterated_attention), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_memory_without_a_kernel_is_of_a_chunk():
  length, heads = 4096, 2
  tokens = jax.ShapeDtypeStruct((1, heads, length, 16), jnp.float32)
  start = jax.ShapeDtypeStruct((1, heads, length), jnp.float32)

  def loss(*inputs):
    return streamed.streamed_attention(*inputs, 3).sum()

  slope = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
  compiled = slope.lower(tokens, tokens, tokens, start).compile()
  taken = compiled.memory_analysis().temp_size_in_bytes
  # Of one head a matrix of pairs has 64 MiB, a chunk 4.
  assert taken < 32 * 2**20
  assert f"{length},{length}" not in compiled.as_text()


SHARPNESS = jnp.asarray([0.3, 2.0])[:, None, None, None]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_each_sequence_stops_by_itself(masked, attend):
  """Values and gradients are those of as many iterations as it takes."""
  masks = (MASK.any(-1), MASK.any(-2)) if masked else (None, None)
  query, key, value = SHARPNESS * TOKENS[0], *TOKENS[1:]
  cotangent = jnp.swapaxes(COTANGENT, 1, 2)
  tolerance = 0.03

  def run(iterations, tolerance, *inputs):
    def loss(*inputs):
      out = attend(*inputs, START, iterations, *masks, tolerance=tolerance)
      return jnp.vdot(cotangent, out), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*inputs)
    return out, *gradients

  stopped = jax.jit(functools.partial(run, 12, tolerance))(query, key, value)
  taken = np.zeros((BATCH, HEADS), int)
  for b, h in np.ndindex(BATCH, HEADS):
    own = [None if mask is None else mask[b, 0] for mask in masks]
    logits = np.float64(query[b, h]) @ np.float64(key[b, h]).T
    taken[b, h] = iterations_to(logits, np.float64(START[b, h]), tolerance, 12, own)
  assert len(np.unique(taken)) > 2
  for count in np.unique(taken):
    plain = jax.jit(functools.partial(run, int(count), None))(query, key, value)
    for found, wanted in zip(stopped, plain, strict=True):
      there = taken == count
      np.testing.assert_allclose(found[there], wanted[there], atol=2e-5)


def iterations_to(logits, f, tolerance, most, masks):
  """Iterations from f to this error of the columns, in float64."""
  rows, columns = (
    np.ones(size, bool) if mask is None else np.asarray(mask)
    for mask, size in zip(masks, logits.shape, strict=True)
  )
  logits, f = logits[np.ix_(rows, columns)], f[rows]
  target = rows.sum() / columns.sum()
  for count in range(1, most + 1):
    g = np.log(target) - logsumexp(logits + f[:, None], axis=0)
    f = -logsumexp(logits + g, axis=1)
    sums = np.exp(logits + f[:, None] + g).sum(0)
    if np.abs(sums - target).sum() / rows.sum() <= tolerance:
      return count
  return most
