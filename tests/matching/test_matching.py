"""Optimal matching with dustbins against plain Sinkhorn, OTT-JAX and known matches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from scipy.special import logsumexp

import asap_jax
from asap_jax.matching import (
  AmortizedMatching,
  OptimalMatching,
  asap_matching,
  matches,
  matching_call,
  matching_problem,
  matching_start,
  sinkhorn_matching,
)

N, M, DIM, Z, T = 9, 7, 5, 0.7, 1.0
KEYS = jax.random.split(jax.random.key(0), 2)
QUERY = jax.random.normal(KEYS[0], (2, N, DIM))
KEY = jax.random.normal(KEYS[1], (2, M, DIM))
MAP = asap_jax.DualMap(
  jnp.ones((1, 1, DIM + 2)), 0.3 * jnp.ones((1, DIM + 4)), ("query", "cumulants")
)
exact = jax.jit(
  sinkhorn_matching, static_argnames=("iterations", "start", "implementation")
)


@functools.partial(jax.jit, static_argnames=("dustbin", "temperature"))
def amortized(query, key, dustbin, *masks, temperature):
  return AmortizedMatching(query.shape[-1], temperature, dustbin)(query, key, *masks)


def compiled(dual_map):
  operator = asap_jax.compiler.operators.Asap(dual_map)
  return jax.jit(functools.partial(asap_matching, operator=operator))


FORMS = {"exact": exact, "compiled": compiled(MAP), "amortized": amortized}
every = pytest.mark.parametrize("name", FORMS)


def plainly(query, key, z=Z, temperature=T, iterations=2000, start=None):
  """The logarithms of the plan in float64, by nothing but its definition."""
  scores = np.asarray(query, np.float64) @ np.asarray(key, np.float64).T / temperature
  (n, m), z = scores.shape, float(z)
  scores = np.pad(scores, (0, 1), constant_values=z)
  a, b = np.log(np.r_[np.ones(n), m]), np.log(np.r_[np.ones(m), n])
  f = np.zeros(n + 1) if start is None else np.asarray(start, np.float64)
  for _ in range(iterations):
    g = b - logsumexp(scores + f[:, None], axis=0)
    f = a - logsumexp(scores + g, axis=1)
  return scores + f[:, None] + g


def test_against_float64_at_convergence_and_after_two_iterations():
  found = exact(QUERY, KEY, Z, temperature=T, iterations=200)
  for i in range(2):
    np.testing.assert_allclose(found[i], plainly(QUERY[i], KEY[i]), atol=1e-4)
  cut = exact(QUERY[0], KEY[0], Z, temperature=T, iterations=2, start="zero")
  masses = np.log(np.r_[np.ones(N), M])
  expected = plainly(QUERY[0], KEY[0], iterations=2, start=masses)
  np.testing.assert_allclose(cut, expected, atol=2e-5)


def test_against_ott():
  scores = np.pad(QUERY[0] @ KEY[0].T / T, (0, 1), constant_values=Z)
  a, b = np.r_[np.ones(N), M] / (N + M), np.r_[np.ones(M), N] / (N + M)
  problem = linear_problem.LinearProblem(
    geometry.Geometry(-scores, epsilon=1.0), a=jnp.asarray(a), b=jnp.asarray(b)
  )
  plan = (N + M) * sinkhorn.Sinkhorn(threshold=1e-6)(problem).matrix
  for implementation in ("xla", "ott"):
    options = {"temperature": T, "iterations": 200, "implementation": implementation}
    found = jnp.exp(exact(QUERY[0], KEY[0], Z, **options))
    np.testing.assert_allclose(found, plan, atol=2e-5)


def test_the_start_gives_the_dustbin_its_mass():
  valid = jnp.arange(N) < jnp.array([[N], [4]])
  problem = matching_problem(QUERY, KEY, Z, valid, temperature=T)
  f = np.float64(matching_start("dustbin", problem))
  np.testing.assert_array_equal(f[:, :-1], 0.0)
  for i, n in ((0, N), (1, 4)):
    scores = np.pad(QUERY[i, :n] @ KEY[i].T / T, (0, 1), constant_values=Z)
    given = np.float64(scores) + np.r_[np.zeros(n), f[i, -1]][:, None]
    columns = np.exp(given - logsumexp(given, axis=0)) * np.r_[np.ones(M), n]
    np.testing.assert_allclose(columns[-1].sum(), M, rtol=1e-5)
  one = exact(QUERY[0], KEY[0], Z, temperature=T, iterations=1)
  plain = plainly(QUERY[0], KEY[0], iterations=1, start=f[0])
  np.testing.assert_allclose(one, plain, atol=2e-5)


@every
def test_known_matches_among_outliers(name):
  random = np.random.default_rng(1)
  points = random.normal(size=(30, 32))
  points /= np.linalg.norm(points, axis=-1, keepdims=True)
  query, key = points[:20], points[10:][random.permutation(20)]
  key = key + 0.02 * random.normal(size=key.shape)
  expected = np.where(
    (points[:20] @ key.T).max(-1) > 0.8, (points[:20] @ key.T).argmax(-1), -1
  )
  given = jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)
  blank = asap_jax.DualMap(jnp.ones((1, 1, 34)), jnp.zeros((1, 36)), MAP.features)
  form = compiled(blank) if name == "compiled" else FORMS[name]
  found = matches(form(*given, 8.0, temperature=0.06))
  np.testing.assert_array_equal(found.key, expected)
  assert (found.confidence[expected >= 0] > 0.5).all()


@every
def test_padding_changes_nothing(name):
  whole = jnp.exp(FORMS[name](QUERY[1, :4], KEY[1, :5], Z, temperature=T))
  masks = jnp.arange(N) < jnp.array([[N], [4]]), jnp.arange(M) < jnp.array([[M], [5]])
  query = jnp.where(masks[0][..., None], QUERY, jnp.nan)
  padded = jnp.exp(FORMS[name](query, KEY, Z, *masks, temperature=T))
  rows, columns = np.r_[:4, N], np.r_[:5, M]
  np.testing.assert_allclose(padded[1][np.ix_(rows, columns)], whole, atol=2e-5)
  np.testing.assert_allclose(padded[1].sum(), 4 + 5, rtol=1e-5)


@every
def test_batches_under_jit_and_vmap_are_single_pairs(name):
  form = functools.partial(FORMS[name], dustbin=Z, temperature=T)
  mapped = jax.jit(jax.vmap(lambda query, key: form(query, key)))(QUERY, KEY)
  np.testing.assert_allclose(mapped, form(QUERY, KEY), atol=1e-4)
  np.testing.assert_allclose(mapped[0], form(QUERY[0], KEY[0]), atol=1e-4)


def test_descriptors_of_16_bits_lose_nothing_more():
  narrow = QUERY.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16)
  found = exact(*narrow, Z, temperature=T)
  wide = exact(*(x.astype(jnp.float32) for x in narrow), Z, temperature=T)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize("start", ["dustbin", "zero"])
def test_gradients_are_differences_of_float64(start):
  cotangent = np.random.default_rng(0).normal(size=(N + 1, M + 1))

  @jax.jit
  def loss(query, key, z, temperature):
    options = {"iterations": 3, "start": start, "temperature": temperature}
    return (exact(query, key, z, **options) * cotangent).sum()

  def of_start(query, key, z, temperature):
    masses = np.log(np.r_[np.ones(N), M])
    if start == "zero":
      return masses
    sums = logsumexp(query @ key.T / temperature, axis=0)
    ends = -50.0, 50.0
    sums = np.r_[sums, z + np.log(N)]
    for _ in range(100):
      x = sum(ends) / 2
      below = (np.r_[np.ones(M), N] / (1 + np.exp(sums - x))).sum() < M
      ends = (x, ends[1]) if below else (ends[0], x)
    return np.r_[np.zeros(N), x - z]

  given = QUERY[0], KEY[0], jnp.float32(Z), jnp.float32(T)
  found = jax.grad(loss, argnums=(0, 1, 2, 3))(*given)
  random = np.random.default_rng(1)
  for place, slope in enumerate(found):
    direction, values = random.normal(size=slope.shape), []
    for step in (1e-5, -1e-5):
      near = [np.asarray(x, np.float64) for x in given]
      near[place] = near[place] + step * direction
      plan = plainly(*near, 3, of_start(*near))
      values.append((plan * cotangent).sum())
    expected = (values[0] - values[1]) / 2e-5
    np.testing.assert_allclose((slope * direction).sum(), expected, rtol=2e-3)


def test_a_module_learns_temperature_and_dustbin_and_its_map_on_its_own_loss():
  layer = AmortizedMatching(DIM, T, Z)

  @nnx.jit
  @nnx.value_and_grad
  def both(layer):
    task = layer(QUERY, KEY)[:, :-1, -1].mean()
    return task + asap_jax.dual_loss(layer)

  before, slopes = both(layer)
  of_map = nnx.filter_state(slopes, asap_jax.DualParam)
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_map)) > 0
  assert slopes["dustbin"][...] != 0
  assert slopes["log_temperature"][...] != 0
  parameters = nnx.state(layer, asap_jax.DualParam)
  moved = jax.tree.map(lambda x, slope: x - 0.002 * slope, parameters, of_map)
  target = jnp.stack([jnp.exp(plainly(QUERY[i], KEY[i])) for i in range(2)])
  far = jnp.abs(jnp.exp(layer(QUERY, KEY)) - target).sum()
  nnx.update(layer, moved)
  assert both(layer)[0] < before
  assert jnp.abs(jnp.exp(layer(QUERY, KEY)) - target).sum() < far
  layer.eval()
  loss = asap_jax.dual_loss(layer)
  layer(2.0 * QUERY, KEY)
  assert asap_jax.dual_loss(layer) == loss


@pytest.mark.slow
def test_a_fitted_operator_is_nearer_than_what_takes_its_time():
  def pair(seed):
    random = np.random.default_rng(seed)
    query = random.normal(size=(4, 24, DIM)) + random.normal(size=(4, 1, DIM))
    key = query[:, ::-1] + 0.3 * random.normal(size=query.shape)
    return jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)

  calls = [matching_call(matching_problem(*pair(i), Z)) for i in range(10)]
  recipe = asap_jax.Recipe(slices=2, refine_steps=200)
  fitted = asap_jax.fit(calls, recipe, iterations=100, scale=1.0, progress=False)
  layer = OptimalMatching(1.0, Z, operator=fitted.attention_fn.operator)
  assert len(jax.tree.leaves(nnx.state(layer, asap_jax.DualParam))) > 1
  found, one, wanted = (
    jnp.exp(x)
    for x in (
      layer(*pair(99)),
      exact(*pair(99), Z, iterations=1, start="zero"),
      exact(*pair(99), Z, iterations=500),
    )
  )
  assert jnp.abs(found - wanted).sum() < 0.5 * jnp.abs(one - wanted).sum()


@pytest.mark.parametrize(
  ("function", "message"),
  [
    (lambda: sinkhorn_matching(QUERY, KEY[:1]), "equal batch axes"),
    (lambda: sinkhorn_matching(QUERY, KEY[..., 1:]), "same last dimension"),
    (lambda: sinkhorn_matching(QUERY, KEY[:, :0]), "at least one point"),
    (
      lambda: sinkhorn_matching(QUERY, KEY, Z, jnp.ones((2, M), bool)),
      r"query_mask has shape \(2, 7\).*expected boolean \(2, 9\)",
    ),
    (lambda: sinkhorn_matching(QUERY, KEY, temperature=0.0), "temperature=0.0"),
    (lambda: sinkhorn_matching(QUERY, KEY, iterations=0), "iterations=0"),
    (lambda: sinkhorn_matching(QUERY, KEY, start="sliced"), "start='sliced'"),
    (
      lambda: sinkhorn_matching(QUERY, KEY, implementation="cudnn"),
      "implementation='cudnn'",
    ),
    (lambda: compiled(MAP)(QUERY[..., 1:], KEY[..., 1:]), "expected one of dim"),
    (lambda: matching_call(matching_problem(QUERY[0], KEY[0])), "expected \\[batch"),
    (lambda: matches(jnp.zeros((3, 1))), r"log_plan has shape \(3, 1\)"),
    (lambda: matches(jnp.zeros((3, 3)), 1.0), "threshold=1.0"),
    (lambda: OptimalMatching(-1.0), "temperature=-1.0"),
    (lambda: OptimalMatching(iterations=0), "iterations=0"),
    (lambda: OptimalMatching(start="none"), "start='none'"),
  ],
)
def test_what_makes_no_sense_is_named(unchecked, function, message):
  with pytest.raises(ValueError, match=message):
    function()
