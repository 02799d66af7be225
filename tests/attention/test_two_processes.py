"""Two processes, each with its own devices, as one mesh."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
  import functools
  import sys
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

  address, index = sys.argv[1], int(sys.argv[2])
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, num_processes=2, process_id=index)
  import asap_jax

  assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
  kind = AxisType.Explicit if sys.argv[3] == "explicit" else AxisType.Auto
  mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(kind,) * 2)
  by_head = NamedSharding(mesh, P("batch", None, "heads"))
  tokens = np.random.default_rng(0).normal(size=(3, 4, 6, 2, 4)).astype(np.float32)
  valid = np.arange(6) < np.array([6, 4, 3, 5])[:, None]
  mask = nnx.make_attention_mask(valid, valid)
  dual_map = asap_jax.DualMap(
    jnp.ones((2, 1, 4)), 0.1 * jnp.ones((2, 5)), ("potentials", "query")
  )
  functions = {
    "gaussian": functools.partial(
      asap_jax.sinkhorn_attention, iterations=2, start="gaussian"
    ),
    "compiled": functools.partial(asap_jax.asap_attention, dual_map=dual_map),
  }

  def spread(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

  for name, function in functions.items():
    def step(query, key, value, mask):
      def loss(query, key, value):
        out = function(query, key, value, mask=mask)
        return (out**2).sum(), out

      grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
      return grad(query, key, value)

    placed = [spread(x, by_head) for x in tokens]
    given = spread(np.asarray(mask), NamedSharding(mesh, P("batch")))
    found = jax.jit(step)(*placed, given)
    wanted = jax.jit(step)(*map(jnp.asarray, tokens), jnp.asarray(mask))
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      for shard in one.addressable_shards:
        expected = np.asarray(other)[shard.index]
        np.testing.assert_allclose(shard.data, expected, rtol=1e-4, atol=1e-5)
  print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["automatic", "explicit"])
def test_two_processes_are_one_mesh(axes):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
  path = os.pathsep.join(entry for entry in sys.path if entry)
  environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}
  command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), address]
  processes = [
    subprocess.Popen(
      [*command, str(index), axes],
      env=environment | {"JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    outcomes = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (printed, errors) in zip(processes, outcomes, strict=True):
    assert process.returncode == 0, errors
    assert "equal" in printed
