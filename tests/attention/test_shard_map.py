"""Inside of `jax.shard_map`, which checks what varies over devices by default."""

import pytest
from helpers.lowered import run_on_host_devices

SCRIPT = """
  import functools
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, PartitionSpec as P
  import asap_jax
  from asap_jax import DualMap, asap_attention, sinkhorn_attention

  mesh = jax.make_mesh((4, 2), ("batch", "spare"), axis_types=(AxisType.Auto,) * 2)
  keys = jax.random.split(jax.random.key(0), 5)
  sliced = DualMap(
    jax.random.normal(keys[0], (2, 3, 4)),
    0.1 * jax.random.normal(keys[1], (2, 3 + 4 + 2)),
  )
  sinkhorn = functools.partial(sinkhorn_attention, iterations=3)
  functions = {
    "softmax": asap_jax.softmax_attention,
    "zero": sinkhorn,
    "gaussian": functools.partial(sinkhorn, start="gaussian"),
    "half": functools.partial(sinkhorn, start="gaussian", iterations=0),
    "tolerance": functools.partial(sinkhorn, tolerance=0.1),
    "chunked": functools.partial(sinkhorn, implementation="chunked"),
    "ott": functools.partial(sinkhorn, implementation="ott"),
    "sliced": asap_attention,
  }
  tokens = [jax.random.normal(key, (8, 6, 2, 4)) for key in keys[2:]]
  valid = jnp.arange(6) < jnp.array([6, 5, 4, 3, 2, 6, 1, 5])[:, None]
  mask = nnx.make_attention_mask(valid, valid)

  for name, function in functions.items():
    def attend(query, key, value, mask, *dual_map):
      bound = {"dual_map": dual_map[0]} if dual_map else {}
      return function(query, key, value, mask=mask, **bound)

    learned = (sliced,) if name == "sliced" else ()
    rows = (P("batch"),) * 3
    for given in (mask, None) if name in ("zero", "sliced") else (mask,):
      specs = *rows, P("batch") if given is not None else None, *(P() for _ in learned)
      spread = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P("batch"))

      def loss(function, moving):
        query, key, value, *dual_map = moving
        return (function(query, key, value, given, *dual_map) ** 2).sum()

      steps = [
        jax.jit(jax.value_and_grad(functools.partial(loss, each)))
        for each in (spread, attend)
      ]
      found, expected = (step((*tokens, *learned)) for step in steps)
      for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5, err_msg=name)

  layer = nnx.MultiHeadAttention(
    2, 8, attention_fn=sinkhorn, decode=False, rngs=nnx.Rngs(0)
  )
  graph, state = nnx.split(layer)

  def sown(state, x):
    look = nnx.capture(lambda layer: layer(x, sow_weights=True), nnx.Intermediate)
    (weights,) = jax.tree.leaves(look(nnx.merge(graph, state, copy=True))[1])
    return weights

  x = jax.random.normal(keys[0], (8, 6, 8))
  spread = jax.shard_map(
    sown, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch")
  )
  np.testing.assert_allclose(jax.jit(spread)(state, x), sown(state, x), atol=1e-5)
  print("spread")
"""


@pytest.mark.slow
def test_values_and_slopes_are_those_of_one_device():
  assert run_on_host_devices(8, SCRIPT) == ["spread"]
