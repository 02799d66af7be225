import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax.potentials import directions as slices

RANDOM = [slices.gaussian, slices.orthogonal]
# One shape for all, as compiling takes the time. The last block of four is cut short.
HEADS, SLICES, DIM = 32, 62, 4


@functools.cache
def sample(draw, seed=7):
  jitted = jax.jit(draw, static_argnums=(1, 2, 3))
  directions = jitted(jax.random.key(seed), HEADS, SLICES, DIM)
  assert directions.dtype == jnp.float32
  return np.asarray(directions, np.float64)


@pytest.mark.parametrize("draw", RANDOM)
def test_random_directions_have_unit_length(draw):
  assert sample(draw).shape == (HEADS, SLICES, DIM)
  np.testing.assert_allclose(np.linalg.norm(sample(draw), axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("draw", RANDOM)
def test_random_directions_depend_on_the_key_alone_under_jit_or_not(draw):
  again = draw(jax.random.key(7), HEADS, SLICES, DIM)
  np.testing.assert_allclose(sample(draw), again, atol=2e-6)
  assert np.abs(sample(draw) - sample(draw, seed=8)).max() > 0.1


@pytest.mark.parametrize("draw", RANDOM)
def test_random_directions_differ_between_heads_and_slices(draw):
  heads = sample(draw)[:, 0]
  for directions in (heads, *sample(draw)[:3]):
    distances = np.linalg.norm(directions[:, None] - directions, axis=-1)
    assert distances[np.triu_indices(len(directions), 1)].min() > 1e-3


def test_orthogonal_within_blocks_of_the_dimension():
  for start in range(0, SLICES, DIM):
    block = sample(slices.orthogonal)[:, start : start + DIM]
    gram = block @ np.swapaxes(block, -1, -2)
    eye = np.broadcast_to(np.eye(block.shape[1]), gram.shape)
    np.testing.assert_allclose(gram, eye, atol=1e-5)


def test_orthogonal_blocks_are_independent():
  directions = sample(slices.orthogonal)
  assert np.abs(directions[:, :DIM] - directions[:, DIM : 2 * DIM]).min(0).max() > 1e-3


@pytest.mark.parametrize("draw", RANDOM)
def test_random_directions_are_uniform_on_the_sphere(draw):
  directions = sample(draw).reshape(-1, DIM)
  moment = directions.T @ directions / len(directions)
  np.testing.assert_allclose(moment, np.eye(DIM) / DIM, atol=0.025)
  np.testing.assert_allclose(directions.mean(0), 0, atol=0.04)
  # The fourth moment of a coordinate, 3 / (dim (dim + 2)), tells the sphere from
  # normalised points of a cube.
  np.testing.assert_allclose((directions**4).mean(), 3 / (DIM * (DIM + 2)), atol=5e-3)


def second_moment_error(directions):
  moment = np.swapaxes(directions, -1, -2) @ directions / SLICES
  return np.linalg.norm(moment - np.eye(DIM) / DIM, axis=(-1, -2)).mean()


def test_orthogonal_directions_err_less_than_independent_ones():
  # Averages over heads; less variance is what these directions are for.
  orthogonal, independent = sample(slices.orthogonal), sample(slices.gaussian)
  assert second_moment_error(orthogonal) < 0.7 * second_moment_error(independent)


@pytest.mark.parametrize("draw", RANDOM)
@pytest.mark.parametrize("name", ["heads", "slices", "dim"])
def test_sizes_below_one_are_refused(draw, name):
  sizes = {"heads": 2, "slices": 3, "dim": 4, name: 0}
  with pytest.raises(ValueError, match=f"{name}=0"):
    draw(jax.random.key(0), **sizes)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_principal_directions_against_numpy(count):
  factors = np.random.default_rng(0).normal(size=(2, 4, 4))
  covariance = (factors @ np.swapaxes(factors, -1, -2)).astype(np.float32)
  directions = slices.principal(jnp.asarray(covariance), count)
  assert directions.shape == (2, count, 4)
  for head, matrix in zip(np.asarray(directions), covariance, strict=True):
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    expected = vectors[:, np.argsort(-values)[:count]].T
    # A sign per direction is free.
    np.testing.assert_allclose(np.abs((head * expected).sum(-1)), 1, atol=1e-5)


def test_principal_directions_work_under_jit():
  covariance = jnp.diag(jnp.array([1.0, 5.0, 3.0]))[None]
  directions = jax.jit(slices.principal, static_argnums=1)(covariance, 2)
  np.testing.assert_allclose(np.abs(directions[0]), [[0, 1, 0], [0, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("count", [0, 4])
def test_principal_count_out_of_range_is_refused(count):
  with pytest.raises(ValueError, match=f"slices={count}"):
    slices.principal(jnp.eye(3)[None], count)


def test_normalise_in_value_and_gradient():
  vectors = np.array([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]])
  unit = jax.jit(slices.normalise)(jnp.asarray(vectors))
  np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
  slope = jax.jit(jax.grad(lambda v: slices.normalise(v)[:2, 0].sum()))
  slope = slope(jnp.asarray(vectors))
  # d(u_1) = (1 - u_1^2, -u_1 u_2) / |v|; zero, not NaN, at the null vector.
  np.testing.assert_allclose(slope[:2], [[0.128, -0.096], [0, 0]], atol=1e-6)
