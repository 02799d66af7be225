"""What Gaussian potentials are compiled to: products and sums, on every device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lowered
from helpers.gaussian_references import COVARIANCES, SIDES

from asap_jax import gaussian_potential

# Slow on accelerators, serial, or bound to a library of one device.
FORBIDDEN = ("custom_call", "gather", "scatter", "sort", "while", "dynamic_slice")


def shapes(dim=8):
  def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)

  points = of(2, 4, 16, dim), of(2, 4, 24, dim)
  return *points, of(2, 1, 16, dtype=bool), of(2, 1, 24)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("covariances", COVARIANCES)
def test_nothing_but_products_and_sums(covariances, side):
  def value_and_slopes(query, key, *weights):
    def loss(query, key):
      found = gaussian_potential(
        query, key, *weights, covariances=covariances, side=side
      )
      return jnp.sum(jnp.sin(found)), found

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(query, key)

  for platform in ("cpu", *lowered.ACCELERATORS):
    text = lowered.exported(value_and_slopes, *shapes(), platform=platform)
    names = set(re.findall(r"(?:stablehlo|chlo)\.(\w+)", text))
    assert {"dot_general", "reduce", "sine"} <= names
    # A TPU repeats steps in a loop, which counts them.
    allowed = {"while"} if platform == "tpu" else set()
    assert lowered.found(dict.fromkeys(names), FORBIDDEN).keys() <= allowed
    assert lowered.loops_on_data(text) == 0


@pytest.mark.parametrize("covariances", COVARIANCES)
def test_the_form_for_a_tpu_is_the_same_function(covariances, monkeypatch):
  keys = jax.random.split(jax.random.key(0), 2)
  query = 2.0 * jax.random.normal(keys[0], (2, 16, 8)) + 0.5
  key = jax.random.normal(keys[1], (2, 24, 8))

  def value_and_slopes():
    def loss(query, key):
      found = gaussian_potential(query, key, covariances=covariances)
      return jnp.sum(jnp.sin(found)), found

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(query, key)

  wanted, taken = value_and_slopes(), []

  def on_a_tpu(*arguments, default, tpu=None, cpu=None):
    taken.append(tpu)
    return (tpu or default)(*arguments)

  monkeypatch.setattr(jax.lax, "platform_dependent", on_a_tpu)
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3),
    value_and_slopes(),
    wanted,
  )
  assert any(taken) == (covariances != "diagonal")


def test_what_is_forbidden_would_be_seen():
  points = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  for word, function in {
    "custom_call": jnp.linalg.eigh,
    "gather": lambda x: x[jnp.argmax(x, -1)],
    "sort": jnp.sort,
    "while": lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, jnp.exp, x),
  }.items():
    exported = jax.export.export(jax.jit(function), platforms=["cpu"])(points)
    assert re.search(rf"stablehlo\.\w*{word}", exported.mlir_module())


SHARDED = """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from asap_jax import gaussian_potential
  from helpers.lowered import collectives

  mesh = jax.make_mesh((2, 2), ("batch", "heads"))
  by_head = NamedSharding(mesh, P("batch", "heads"))
  by_row = NamedSharding(mesh, P("batch"))
  keys = jax.random.split(jax.random.key(0), 2)
  query = 2.0 * jax.random.normal(keys[0], (4, 2, 8, 6)) + 0.5
  key = jax.random.normal(keys[1], (4, 2, 12, 6))
  masks = jnp.arange(8) < jnp.array([8, 5, 7, 3])[:, None, None], jnp.ones((4, 1, 12))
  arguments = query, key, *masks

  for covariances in ("diagonal", "low_rank", "full"):
    for side in ("query", "key"):
      options = {"covariances": covariances, "side": side}

      def value_and_slopes(query, key, *weights):
        def loss(query, key):
          found = gaussian_potential(query, key, *weights, **options)
          return found, found

        found, pull, _ = jax.vjp(loss, query, key, has_aux=True)
        return found, pull(jnp.cos(found))

      compiled = jax.jit(
        value_and_slopes,
        in_shardings=(by_head, by_head, by_row, by_row),
        out_shardings=(by_head, (by_head, by_head)),
      ).lower(*arguments).compile()
      assert "f32[2,1," in compiled.as_text(), "not partitioned"
      found = collectives(compiled)
      assert not found, (covariances, side, found)
      placed = [
        jax.device_put(x, s) for x, s in zip(arguments, (by_head,) * 2 + (by_row,) * 2)
      ]
      actual, expected = compiled(*placed), jax.jit(value_and_slopes)(*arguments)
      for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert len(one.sharding.device_set) == 4
        size = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=1e-3 * size)

  # A sum over the batch would be seen.
  summed = jax.jit(lambda x: x.sum(0), in_shardings=by_head)
  assert collectives(summed.lower(query).compile())
  print("sharded")
"""


@pytest.mark.slow
def test_a_sharded_batch_and_heads_need_no_communication():
  assert lowered.run_on_host_devices(4, SHARDED) == ["sharded"]
