"""NNX modules of the peers: what they hold, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.peer_cases import HEADS, JITTED, SLICES, N, normal

from asap_jax.peers import (
  differential_attention,
  esp_attention,
  lambda_init,
  lot_attention,
)
from asap_jax.peers.layers import (
  DifferentialAttention,
  ESPAttention,
  LOTAttention,
)

WIDTH, DIM = 8, 4
X, TARGET = normal(2, N, WIDTH), normal(2, N, WIDTH)
INPUTS = [normal(2, N, HEADS, DIM) for _ in range(3)]
MAKE = {
  "esp": lambda rngs: ESPAttention(
    HEADS, SLICES, DIM, rngs=rngs, sort_temperature=0.1, inverse_temperature=2.0
  ),
  "lot": lambda rngs: LOTAttention(HEADS, 3, DIM, rngs=rngs, iterations=2),
  "differential": lambda rngs: DifferentialAttention(DIM, layer=3, rngs=rngs),
}
each = pytest.mark.parametrize("name", MAKE)


@pytest.mark.slow
@each
def test_parameters_train_inside_multi_head_attention(name):
  layer = nnx.MultiHeadAttention(
    HEADS, WIDTH, decode=False, attention_fn=MAKE[name](nnx.Rngs(1)), rngs=nnx.Rngs(0)
  )
  optimizer = nnx.Optimizer(layer, optax.adam(0.01), wrt=nnx.Param)
  mask = nnx.make_attention_mask(*[jnp.arange(N) < jnp.asarray([[N], [4]])] * 2)

  @nnx.jit
  def step(layer, optimizer):
    def loss(layer):
      return ((layer(X, mask=mask) - TARGET) ** 2).mean()

    value, slope = nnx.value_and_grad(loss)(layer)
    optimizer.update(layer, slope)
    return value

  before = dict(nnx.to_flat_state(jax.tree.map(jnp.copy, nnx.state(layer, nnx.Param))))
  losses = [step(layer, optimizer) for _ in range(10)]
  assert losses[-1] < losses[0]
  after = dict(nnx.to_flat_state(nnx.state(layer, nnx.Param)))
  held = [path for path in after if "attention_fn" in path]
  assert held
  for path in held:
    assert np.abs(after[path][...] - before[path][...]).max() > 0, path


@each
def test_module_calls_its_function(name):
  module = MAKE[name](nnx.Rngs(1))
  expected = {
    "esp": lambda: esp_attention(
      *INPUTS,
      directions=module.directions[...],
      sort_temperature=0.1,
      inverse_temperature=2.0,
    ),
    "lot": lambda: lot_attention(*INPUTS, pivot=module.pivot, iterations=2),
    "differential": lambda: differential_attention(
      *INPUTS, parameters=module.parameters, initial=lambda_init(3)
    ),
  }[name]
  np.testing.assert_allclose(nnx.jit(module)(*INPUTS), jax.jit(expected)(), atol=1e-5)


def test_start_of_the_parameters():
  esp, lot, differential = (MAKE[name](nnx.Rngs(1)) for name in list(MAKE)[:3])
  gram = jnp.einsum("hld,hmd->hlm", *[esp.directions[...]] * 2)
  np.testing.assert_allclose(gram, jnp.broadcast_to(jnp.eye(SLICES), gram.shape),
                             atol=1e-5)  # fmt: skip
  np.testing.assert_array_equal(lot.masses[...], 0)
  assert lot.points.shape == (HEADS, 3, DIM)
  assert differential.vectors.shape == (4, DIM // 2)
  np.testing.assert_array_equal(differential.gain[...], jnp.ones(DIM))


def test_a_call_may_replace_options():
  lot = MAKE["lot"](nnx.Rngs(1))
  expected = JITTED["lot"](*INPUTS, pivot=lot.pivot, iterations=7)
  replaced = nnx.jit(lot, static_argnames="iterations")
  np.testing.assert_allclose(replaced(*INPUTS, iterations=7), expected, atol=1e-5)


def test_odd_dimension_is_refused():
  with pytest.raises(ValueError, match=r"dim=3: expected an even number"):
    DifferentialAttention(3, layer=1, rngs=nnx.Rngs(0))
