import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import peer_references as papers
from helpers.peer_cases import sown_weights

from asap_jax.peers import qontot
from asap_jax.peers.layers import QontOTAttention
from asap_jax.peers.qontot import circuit, doubly_stochastic, qontot_attention

QUERY, KEY, VALUE = jax.random.normal(jax.random.key(0), (3, 2, 9, 2, 4))
jitted = jax.jit(circuit, static_argnums=1)


def angles_of(*shape):
  return 3.0 * jax.random.normal(jax.random.key(1), (*shape, 4))


@pytest.mark.parametrize(("layers", "qubits"), [(5, 2), (4, 3), (3, 4), (6, 5)])
def test_the_circuit_is_unitary_and_that_of_kronecker_products(layers, qubits):
  angles = angles_of(2, layers, qubits // 2)
  found = np.asarray(jitted(angles, qubits))
  product = found @ found.conj().swapaxes(-1, -2)
  np.testing.assert_allclose(product, [np.eye(2**qubits)] * 2, atol=1e-6)
  expected = [papers.circuit(each, qubits) for each in np.float64(angles)]
  np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize("auxiliaries", [0, 1, 2])
def test_plans_of_circuits_are_doubly_stochastic(auxiliaries):
  plan = doubly_stochastic(jitted(angles_of(3, 4, 2), 4), auxiliaries)
  assert plan.shape == (3, 2 ** (4 - auxiliaries), 2 ** (4 - auxiliaries))
  assert (plan >= 0).all()
  for axis in (-1, -2):
    np.testing.assert_allclose(plan.sum(axis), 1.0, atol=1e-6)


def test_circuits_of_known_result():
  # All angles zero: a CNOT, whose control is the only data qubit, leaves that as it is.
  none = jnp.zeros((1, 1, 4))
  np.testing.assert_allclose(doubly_stochastic(circuit(none, 2), 1), np.eye(2))
  # Without auxiliary qubits it exchanges the last two states.
  exchanged = np.eye(4)[[0, 1, 3, 2]]
  np.testing.assert_allclose(doubly_stochastic(circuit(none, 2), 0), exchanged)
  # The second layer's control is the second qubit: 01 -> 11, and back by the third.
  np.testing.assert_allclose(
    doubly_stochastic(circuit(jnp.zeros((3, 1, 4)), 2), 0), np.eye(4)[[0, 2, 1, 3]]
  )
  # A rotation of the data qubit by 2 pi / 3 about y, in whatever phase.
  turned = none.at[0, 0, 0].set(2 * np.pi / 3).at[0, 0, 1].set(0.7)
  expected = [[1 / 4, 3 / 4], [3 / 4, 1 / 4]]
  plan = doubly_stochastic(circuit(turned, 2), 1)
  np.testing.assert_allclose(plan, expected, atol=1e-6)


@pytest.mark.parametrize(("n", "auxiliaries"), [(1, 1), (2, 0), (4, 2), (9, 1)])
def test_rows_and_columns_are_exact_at_once(n, auxiliaries):
  options = {"layers": 4, "auxiliaries": auxiliaries}
  inputs = [3.0 * x[:, :n] for x in (QUERY, KEY, VALUE)]
  valid = jnp.arange(n) < jnp.array([[n], [5]])
  mask = nnx.make_attention_mask(valid, valid)
  plan = sown_weights(qontot_attention, *inputs, mask=mask, **options)
  expected = jnp.broadcast_to(valid[:, None], plan.shape[:-1])
  for axis in (-1, -2):
    np.testing.assert_allclose(plan.sum(axis), expected, atol=1e-6)
  assert (plan >= 0).all()
  if n == 9:
    unmasked = sown_weights(qontot_attention, *inputs, **options)
    np.testing.assert_allclose(unmasked[0], plan[0], atol=1e-6)


def test_more_angles_than_logits_begin_again():
  layers, theta = 6, jax.random.normal(jax.random.key(2), (1, 24))
  inputs = [x[:, :2] for x in (QUERY, KEY, VALUE)]
  found = sown_weights(qontot_attention, *inputs, theta=theta, layers=layers)
  for batch, head in np.ndindex(2, 2):
    q, k = (np.float64(x[batch, :, head]) for x in inputs[:2])
    expected = papers.qontot(q @ k.T / 2, np.float64(theta[0]), layers, 1, 1)
    np.testing.assert_allclose(found[batch, head], expected, atol=1e-5)


@pytest.mark.slow
def test_eager_agrees_with_jit():
  inputs = [x[:1, :3] for x in (QUERY, KEY, VALUE)]
  found = qontot_attention(*inputs, layers=2)
  expected = jax.jit(lambda *x: qontot_attention(*x, layers=2))(*inputs)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_module_learns_theta():
  attention = QontOTAttention(2, 9, layers=2)
  expected = qontot_attention(QUERY, KEY, VALUE, layers=2)
  np.testing.assert_allclose(attention(QUERY, KEY, VALUE), expected, atol=1e-5)

  @nnx.jit
  @nnx.grad
  def slope(attention):
    return (attention(QUERY, KEY, VALUE) ** 2).sum()

  found = nnx.state(slope(attention))["theta"][...]
  assert found.shape == (2, 256)
  # Of the 81 logits of nine tokens, in the corner of a square of sixteen.
  assert (jnp.abs(found) > 0).sum(-1).min() > 40


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"layers": 0}, "layers=0: expected at least one"),
    ({"auxiliaries": -1}, "auxiliaries=-1: expected 0"),
    ({"auxiliaries": 9}, "13 qubits.* 8,192 rows a head: expected at most 12"),
    ({"theta": jnp.ones((2, 5))}, r"\(2, 5\): expected \[2 or 1, 256\]"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    qontot_attention(QUERY, KEY, VALUE, **options)


def test_what_has_no_square_is_refused():
  with pytest.raises(ValueError, match="query has 9 tokens, key 8: qontot"):
    qontot_attention(QUERY, KEY[:, :8], VALUE[:, :8])
  rows = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
  mask = nnx.make_attention_mask(rows, jnp.ones_like(rows))
  found = qontot_attention(QUERY, KEY, VALUE, mask=mask, layers=1)
  assert jnp.isnan(found[:, :6]).all()


def test_the_largest_circuit_is_the_limit():
  assert qontot.data_qubits(2048, 1) == 11
  with pytest.raises(ValueError, match="2049 tokens"):
    qontot.data_qubits(2049, 1)
