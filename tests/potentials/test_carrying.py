"""Sorts that carry values, against NumPy; and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax.potentials.carrying import alike, hold, move, shift, sort_with

RANDOM = np.random.default_rng(0)
SHAPE = 2, 3, 11
KEYS = jnp.asarray(np.round(RANDOM.normal(size=SHAPE), 1), jnp.float32)
VALUES = jnp.asarray(RANDOM.normal(size=SHAPE), jnp.float32)
PLACES = jnp.asarray(RANDOM.permuted(np.tile(np.arange(11), (2, 3, 1)), axis=-1))
KNOWN = jnp.asarray(RANDOM.random(SHAPE) < 0.4)
RUNS = KNOWN.at[..., 0].set(True)


def test_sort_is_stable_and_carries():
  keys, order, values, numbers = sort_with(KEYS, VALUES, PLACES)
  wanted = np.argsort(KEYS, axis=-1, kind="stable")
  assert len(np.unique(KEYS)) < KEYS.size
  np.testing.assert_array_equal(order, wanted)
  for found, given in ((keys, KEYS), (values, VALUES), (numbers, PLACES)):
    np.testing.assert_array_equal(found, np.take_along_axis(given, wanted, -1))


def test_moved_values_stand_at_their_places():
  found, numbers = move(PLACES, VALUES, PLACES)
  wanted = np.empty(SHAPE, np.float32)
  np.put_along_axis(wanted, np.asarray(PLACES), np.asarray(VALUES), -1)
  np.testing.assert_array_equal(found, wanted)
  np.testing.assert_array_equal(numbers, np.broadcast_to(np.arange(11), SHAPE))


@pytest.mark.parametrize("by", [0, 1, -2, 12, -11])
def test_shift_moves_zeros_in(by):
  wanted = np.zeros(SHAPE, np.float32)
  for place in range(11):
    if 0 <= place - by < 11:
      wanted[..., place] = VALUES[..., place - by]
  np.testing.assert_array_equal(shift(VALUES, by), wanted)


def copied(known, values, backwards):
  """What is held, place by place."""
  turn = slice(None, None, -1 if backwards else 1)
  known, values = known[turn], values[turn]
  wanted, last = np.zeros_like(values), 0.0
  for place in range(len(values)):
    last = values[place] if known[place] else last
    wanted[place] = last
  return wanted[turn]


@pytest.mark.parametrize("backwards", [False, True])
def test_held_values_and_tangents_are_copies(backwards):
  values = jnp.sort(VALUES - 1.0, axis=-1)
  found = jax.jvp(lambda x: hold(KNOWN, x, backwards), (values,), (VALUES,))
  for actual, given in zip(found, (values, VALUES), strict=True):
    for index in np.ndindex(SHAPE[:-1]):
      known, own = np.asarray(KNOWN[index]), np.asarray(given[index])
      np.testing.assert_array_equal(actual[index], copied(known, own, backwards))


FUNCTIONS = {
  "keys": lambda x: sort_with(x)[0],
  "carried": lambda x: sort_with(KEYS, PLACES, x)[3],
  "moved": lambda x: move(PLACES, jnp.sin(x), x)[0],
  "held": lambda x: hold(KNOWN, jax.lax.cummax(x, 2), True),
  "alike": lambda x: alike(RUNS, x),
}


def matrix(name):
  """The derivative of the first sequence, which is a matrix of zeros and ones."""
  if name == "keys":
    to = np.argsort(VALUES[0, 0], kind="stable")
  elif name == "carried":
    to = np.argsort(KEYS[0, 0], kind="stable")
  elif name == "moved":
    return np.cos(VALUES[0, 0]) * np.eye(11)[np.argsort(PLACES[0, 0])]
  elif name == "alike":
    to = copied(RUNS[0, 0], np.arange(11), False)
  else:
    return None
  return np.eye(11)[to]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_in_both_modes_and_under_vmap(name):
  function, rows = FUNCTIONS[name], jnp.eye(11)

  def push(tangent):
    tangent = jnp.zeros(SHAPE).at[0, 0].set(tangent)
    return jax.jvp(function, (VALUES,), (tangent,))[1][0, 0]

  def pull(cotangent):
    cotangent = jnp.zeros(SHAPE).at[0, 0].set(cotangent)
    return jax.vjp(function, VALUES)[1](cotangent)[0][0, 0]

  forward, reverse = (jax.jit(jax.vmap(mode))(rows) for mode in (push, pull))
  np.testing.assert_allclose(forward.T, reverse, atol=1e-6)
  wanted = matrix(name)
  if wanted is None:  # each held value is one of those known, or none
    assert set(np.unique(reverse)) == {0.0, 1.0}
  else:
    np.testing.assert_allclose(reverse, wanted, atol=1e-6)


def test_second_derivatives_in_a_loop():
  def sums(x):
    def step(x, _):
      keys, _, carried = sort_with(x, x**2)
      return move(PLACES, jnp.sin(keys) + carried)[0], None

    return jnp.sum(jax.lax.scan(step, x, length=2)[0] ** 2)

  slope = jax.jit(jax.grad(sums))

  @jax.jit
  @jax.grad
  def second(x):
    return jnp.vdot(PLACES, jax.grad(sums)(x))

  step, along = 1e-3, jnp.asarray(PLACES, jnp.float32)
  x = 0.3 * VALUES
  wanted = (slope(x + step * along) - slope(x - step * along)) / (2 * step)
  found = second(x)
  # Where differences cross no change of order.
  inside = np.abs(np.asarray(wanted - found)) < 0.02 * (1 + np.abs(wanted))
  assert inside.mean() > 0.9
