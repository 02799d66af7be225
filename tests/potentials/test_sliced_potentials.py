import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles
from helpers.oracles import KEY_MASSES, QUERY_MASK, M, N, on_device

from asap_jax.potentials.kantorovich import sliced_potentials

HEADS, SLICES, DIM = 2, 3, 4
solve = jax.jit(sliced_potentials)


def arguments(seed=0, batch=(HEADS,)):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((*batch, N, DIM), (*batch, M, DIM), (HEADS, SLICES, DIM))
  )


# A mask of its own for each head on one side, masses shared by both on the other.
WEIGHTS = (np.stack([QUERY_MASK, QUERY_MASK[::-1]]), KEY_MASSES)


def loop(query, key, directions, query_weights, key_weights):
  """Potentials and transport of every head and slice, by itself, in float64."""
  results = []
  for head in range(HEADS):
    a = None if query_weights is None else query_weights[head]
    for theta in directions[head]:
      x, y = query[head] @ theta, key[head] @ theta
      potentials = oracles.potentials(x, y, a, key_weights)
      results.append((*potentials, oracles.transport(x, y, a, key_weights)))
  return [
    np.stack(parts).reshape(HEADS, SLICES, -1) for parts in zip(*results, strict=True)
  ]


@pytest.mark.parametrize("weights", [(None, None), WEIGHTS], ids=["equal", "weights"])
def test_against_a_loop_over_heads_and_slices(weights):
  query, key, directions = arguments()
  given = on_device(weights)
  actual, projected = solve(query, key, directions, *given)
  in_float64 = [np.asarray(a, np.float64) for a in (query, key, directions)]
  for ours, expected in zip(actual, loop(*in_float64, *weights), strict=True):
    np.testing.assert_allclose(ours, expected, atol=2e-5)
  expected = np.einsum("hnd,hld->hln", in_float64[0], in_float64[2])
  np.testing.assert_allclose(projected, expected, atol=1e-5)


def test_directions_broadcast_over_the_batch():
  query, key, directions = arguments(batch=(2, HEADS))
  mask = jnp.asarray(WEIGHTS[0])[:, None]
  potentials, projected = solve(query, key, directions[None], mask)
  assert projected.shape == (2, HEADS, SLICES, N)
  assert potentials.psi.shape == (2, HEADS, SLICES, M)
  for batch in range(2):
    given = [np.asarray(a, np.float64) for a in (query[batch], key[batch], directions)]
    per_head = np.broadcast_to(WEIGHTS[0][batch], (HEADS, N))
    expected = loop(*given, per_head, None)
    for ours, theirs in zip(potentials, expected, strict=True):
      np.testing.assert_allclose(ours[batch], theirs, atol=2e-5)


def test_gradients_against_finite_differences():
  values = arguments(1)
  cotangents = [
    np.random.default_rng(seed).normal(size=(HEADS, SLICES, size))
    for seed, size in enumerate((N, M))
  ]

  @jax.jit
  @jax.grad
  def slope(values):
    weights = on_device(WEIGHTS)
    potentials, _ = sliced_potentials(*values, *weights)
    pairs = zip(cotangents, potentials[:2], strict=True)
    return sum(jnp.vdot(c, p) for c, p in pairs)

  in_float64 = [np.asarray(a, np.float64) for a in values]

  def oracle(moved, place):
    given = [moved if i == place else a for i, a in enumerate(in_float64)]
    pairs = zip(cotangents, loop(*given, *WEIGHTS)[:2], strict=True)
    return sum(np.vdot(c, p) for c, p in pairs)

  actual = slope(values)
  expected = oracles.gradient(lambda theta: oracle(theta, 2), in_float64[2])
  np.testing.assert_allclose(actual[2], expected, atol=5e-4)
  # The many entries of queries and keys: along a few random tangents.
  rng = np.random.default_rng(3)
  for place in (0, 1):
    for _ in range(3):
      point = in_float64[place]
      tangent = rng.normal(size=point.shape)
      along = oracles.gradient(
        lambda t, p=point, v=tangent, place=place: oracle(p + t * v, place), 0.0
      )
      np.testing.assert_allclose(np.vdot(actual[place], tangent), along, atol=2e-3)


def test_half_precision_inputs_are_projected_in_float32():
  inputs = tuple(a.astype(jnp.bfloat16) for a in arguments())
  potentials, projected = solve(*inputs)
  assert {a.dtype for a in (*potentials, projected)} == {jnp.dtype(jnp.float32)}
  query, _, directions = (np.asarray(a.astype(jnp.float32)) for a in inputs)
  expected = np.einsum("hnd,hld->hln", query, directions)
  np.testing.assert_allclose(projected, expected, atol=1e-5)


def test_padding_of_the_queries_reaches_no_gradient():
  query, key, directions = arguments()
  mask = jnp.asarray(QUERY_MASK)

  @jax.jit
  @jax.value_and_grad
  def loss(query):
    potentials, _ = sliced_potentials(query, key, directions, mask)
    return jnp.sin(potentials.phi).sum() + jnp.sin(potentials.psi).sum()

  expected = loss(query)
  actual = loss(jnp.where(mask[:, None], query, 1e6))
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  np.testing.assert_array_equal(actual[1][:, ~QUERY_MASK], 0)


def test_arguments_that_do_not_fit_are_refused():
  query, key, directions = arguments()
  with pytest.raises(ValueError, match="expected the same last dimension"):
    jax.eval_shape(sliced_potentials.__wrapped__, query, key, directions[..., 1:])
  with pytest.raises(ValueError, match="query_weights has shape"):
    sliced_potentials(query, key, directions, jnp.ones(M, bool))
  with pytest.raises(ValueError, match="key_weights has shape"):
    sliced_potentials(query, key, directions, None, jnp.ones(N))
