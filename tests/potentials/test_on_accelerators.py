"""The accelerators' form of potentials, run on a CPU and lowered for accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lowered, oracles
from helpers.oracles import KEY_MASK, QUERY_MASK, WEIGHTS, M, N, on_device

from asap_jax import kantorovich_potentials, sliced_potentials
from asap_jax.masses import zero_invalid
from asap_jax.potentials import on_accelerators, on_cpu, sliced_start

RANDOM = np.random.default_rng(0)
PROBLEMS = 4
FORMS = {"accelerators": on_accelerators.potentials, "cpu": on_cpu.potentials}


def problems(n, m):
  """Points of both sides: random ones, then rounded so that many are equal."""
  x, y = (RANDOM.normal(size=(PROBLEMS, size)) for size in (n, m))
  x[-2:], y[-1] = np.round(x[-2:]), np.round(y[-1])
  return tuple(jnp.asarray(points, jnp.float32) for points in (x, y))


@functools.partial(jax.jit, static_argnums=0)
def solve(form, points, weights, cotangents):
  """Potentials and transport, zero at absent points, and gradients."""

  def loss(points):
    found = FORMS[form](*points, *weights)
    of_sides = (*weights, weights[0])
    found = [zero_invalid(p, w) for p, w in zip(found, of_sides, strict=True)]
    return sum(map(jnp.vdot, cotangents, found)), found

  slopes, found = jax.grad(loss, has_aux=True)(points)
  return found, slopes


def cotangents(n, m):
  return tuple(
    jnp.asarray(RANDOM.normal(size=(PROBLEMS, size)), jnp.float32) for size in (n, m, n)
  )


@pytest.mark.parametrize("name", WEIGHTS)
def test_values_against_float64(name):
  x, y = problems(N, M)
  weights = WEIGHTS[name]
  found, _ = solve("accelerators", (x, y), on_device(weights), cotangents(N, M))
  for row in range(PROBLEMS):
    wanted = oracles.potentials(x[row], y[row], *weights)
    for actual, expected in zip(found[:2], wanted, strict=True):
      np.testing.assert_allclose(actual[row], expected, atol=1e-5)
  # Equal points are sent to one place, which the oracle does not know of.
  for row in range(PROBLEMS - 2):
    wanted = oracles.transport(np.asarray(x[row]), np.asarray(y[row]), *weights)
    np.testing.assert_allclose(found[2][row], wanted, atol=1e-6)


CASES = {
  **{name: (N, M, weights) for name, weights in WEIGHTS.items()},
  "one to one": (7, 7, (None, None)),
  "as many of each": (N, N, (QUERY_MASK, QUERY_MASK[::-1].copy())),
  "a single query": (1, 5, (None, None)),
  "a single key": (5, 1, (None, None)),
  "a pair": (1, 1, (None, None)),
  "no query": (N, M, (np.zeros(N, bool), None)),
  "no key": (N, M, (None, np.zeros(M, np.float32))),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_cpus(name):
  n, m, weights = CASES[name]
  arguments = problems(n, m), on_device(weights), cotangents(n, m)
  found, wanted = (solve(form, *arguments) for form in FORMS)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, wanted
  )
  moves = max(float(jnp.abs(slope).max()) for slope in wanted[1]) > 0.1
  assert moves == (not name.startswith("no "))


def test_holes_in_padding_reach_neither_values_nor_gradients():
  (x, y), weights = problems(N, M), on_device(WEIGHTS["masks"])
  arguments = weights, cotangents(N, M)
  wanted = solve("accelerators", (x, y), *arguments)
  for hole in (jnp.nan, jnp.inf, -jnp.inf):
    holed = jnp.where(QUERY_MASK, x, hole), jnp.where(KEY_MASK, y, hole)
    found = solve("accelerators", holed, *arguments)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_outliers_cost_the_others_nothing():
  # Sums of differences would lose the others' digits.
  x, y = problems(N, M)
  points = x.at[:, 2].set(-1e9), y.at[:, 4].set(3e9)
  arguments = points, (None, None), cotangents(N, M)
  ((_, _, transport), _), ((_, _, wanted), _) = (
    solve(form, *arguments) for form in FORMS
  )
  np.testing.assert_array_equal(transport, wanted)


def tokens(size):
  return jax.ShapeDtypeStruct((2, 4, size, 8), jnp.float32)


def masses(dtype):
  return tuple(jax.ShapeDtypeStruct((2, 1, size), dtype) for size in (16, 24))


DIRECTIONS = jax.ShapeDtypeStruct((4, 3, 8), jnp.float32)


def on_the_line(query, key, *weights):
  return kantorovich_potentials(query[..., 0], key[..., 0], *weights)


def along(directions, query, key, *weights):
  return sliced_potentials(query, key, directions, *weights)


LOWERED = {
  "whole": (on_the_line, (tokens(24), tokens(24))),
  "sizes": (on_the_line, (tokens(16), tokens(24))),
  "masks": (along, (DIRECTIONS, tokens(16), tokens(24), *masses(bool))),
  "masses": (along, (DIRECTIONS, tokens(16), tokens(24), *masses(jnp.float32))),
  "start": (sliced_start, (tokens(16), tokens(24))),
}


@functools.cache
def operations(name, platforms=lowered.ACCELERATORS):
  """Of values and gradients, as exported."""
  function, arguments = LOWERED[name]

  def values_and_slopes(*arguments):
    floats = [i for i, a in enumerate(arguments) if a.dtype == jnp.float32]

    def loss(*arguments):
      found = function(*arguments)
      return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(found)), found

    return jax.value_and_grad(loss, floats, has_aux=True)(*arguments)

  return lowered.operations(values_and_slopes, *arguments, platforms=platforms)


@pytest.mark.parametrize("name", LOWERED)
def test_nothing_is_looked_up_and_nothing_loops(name):
  for platform, counted in operations(name).items():
    # Sorts, by which all is done, and sums over the points.
    assert counted["sort"] >= 6, platform
    assert counted["reduce_window"] >= 2, platform
    assert not lowered.found(counted, lowered.LOOK_UPS + lowered.LOOPS), platform


def test_what_is_forbidden_is_seen_in_the_cpus_form():
  counted = operations("masses", ("cpu",))["cpu"]
  for words in (("gather",), ("scatter",), lowered.LOOPS):
    assert lowered.found(counted, words)


SHARDED = """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from asap_jax import sliced_potentials
  from asap_jax.potentials import on_accelerators, on_cpu
  from helpers.lowered import collectives

  on_cpu.potentials = on_accelerators.potentials
  mesh = jax.make_mesh((4, 2), ("batch", "heads"))
  by_head = NamedSharding(mesh, P("batch", "heads"))
  by_row, heads = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P("heads"))
  keys = jax.random.split(jax.random.key(0), 3)
  directions = jax.random.normal(keys[0], (4, 3, 6))
  query = jax.random.normal(keys[1], (8, 4, 8, 6))
  key = jax.random.normal(keys[2], (8, 4, 12, 6))
  lengths = jnp.array([8, 5, 7, 3, 8, 1, 2, 6])[:, None, None]
  mask, masses = jnp.arange(8) < lengths, 1.0 + jnp.arange(12.0) * jnp.ones((8, 1, 1))

  def values_and_slopes(directions, query, key, *weights):
    def values(query, key):
      potentials, _ = sliced_potentials(query, key, directions, *weights)
      return tuple(potentials)

    found, pull = jax.vjp(values, query, key)
    return found, pull(jax.tree.map(jnp.cos, found))

  for weights in ((), (mask, None), (mask, masses)):
    arguments = directions, query, key, *weights
    rows = [None if w is None else by_row for w in weights]
    sharded = heads, by_head, by_head, *rows
    compiled = jax.jit(
      values_and_slopes, in_shardings=sharded, out_shardings=by_head
    ).lower(*arguments).compile()
    assert "f32[2,2,3," in compiled.as_text(), "not partitioned"
    assert not collectives(compiled), collectives(compiled)
    placed = [
      x if s is None else jax.device_put(x, s) for x, s in zip(arguments, sharded)
    ]
    actual, expected = compiled(*placed), jax.jit(values_and_slopes)(*arguments)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
      assert len(one.sharding.device_set) == 8
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

  summed = jax.jit(lambda x: x.sum(0), in_shardings=by_head).lower(query).compile()
  assert collectives(summed), "a sum over the batch would be seen"
  print("sharded")
"""


@pytest.mark.slow
def test_a_sharded_batch_and_heads_need_no_communication():
  assert lowered.run_on_host_devices(8, SHARDED) == ["sharded"]
