"""Sequences spread over devices, against whole ones on one device."""

import jax
import jax.numpy as jnp
import pytest
from helpers.lowered import run_on_host_devices

import asap_jax
from asap_jax.attention.sequence_sharded import sequence_sharded_attention

SCRIPT = """
  import functools
  import re
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, PartitionSpec as P
  import asap_jax
  from asap_jax import DualMap, asap_attention, sinkhorn_attention
  from asap_jax.attention.sequence_sharded import sequence_sharded_attention

  kinds = (AxisType.Auto,) * 3
  mesh = jax.make_mesh((2, 2, 2), ("batch", "queries", "keys"), axis_types=kinds)
  keys = jax.random.split(jax.random.key(0), 5)
  sliced = DualMap(
    jax.random.normal(keys[0], (2, 3, 4)),
    0.1 * jax.random.normal(keys[1], (2, 3 + 4 + 2)),
  )
  half = DualMap(
    jnp.ones((2, 1, 4)),
    0.1 * jax.random.normal(keys[1], (2, 2)),
    ("cumulants",),
    side="key",
    half=True,
  )
  cases = {
    "one": {"iterations": 1},
    "four": {"iterations": 4},
    "gaussian": {"iterations": 2, "start": "gaussian"},
    "no iteration": {"iterations": 0, "start": "gaussian"},
    "sliced": {"dual_map": sliced},
    "closures": {"dual_map": sliced.with_closures(3)},
    "half": {"dual_map": half},
  }
  tokens = [2.0 * jax.random.normal(key, (4, 8, 2, 4)) for key in keys[2:]]
  valid = jnp.arange(8) < jnp.array([8, 6, 3, 5])[:, None]
  mask = nnx.make_attention_mask(valid, valid)

  def collectives(text):
    return len(re.findall(r"\\ball-gather(?:-start)?\\(", text))

  for name in NAMES:
    options = cases[name]
    ways = (
      (("queries", "keys"), (True, False)),
      ((None, "keys"), (True,)),
      (("queries", None), (False,)),
    )
    # What differs in the start or the map alone is spread in one way.
    for axes, masked in ways if name in ("one", "four") else ways[1:2]:
      rows, columns = P("batch", axes[0]), P("batch", axes[1])
      for given in (valid if each else None for each in masked):
        def attend(query, key, value, *valid):
          both = dict(zip(("query_valid", "key_valid"), valid))
          return sequence_sharded_attention(
            query, key, value, query_axis=axes[0], key_axis=axes[1], **both, **options
          )

        masks = () if given is None else (given, given)
        spread = jax.shard_map(
          attend,
          mesh=mesh,
          in_specs=(rows, columns, columns, *(rows, columns)[: len(masks)]),
          out_specs=rows,
        )
        whole = functools.partial(
          sinkhorn_attention if "iterations" in options else asap_attention,
          mask=None if given is None else mask,
          **options,
        )

        def loss(function, *tokens):
          out = function(*tokens)
          return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

        found, expected = (
          jax.jit(jax.value_and_grad(functools.partial(loss, each), argnums=(0, 1, 2)))
          for each in (lambda *tokens: spread(*tokens, *masks), whole)
        )
        found, expected = found(*tokens), expected(*tokens)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
          np.testing.assert_allclose(one, other, rtol=1e-4, atol=5e-5, err_msg=name)
      if given is None and "start" not in options and "iterations" in options:
        text = jax.jit(spread).lower(*tokens).compile().as_text()
        # Of four iterations a loop runs three: two are written out.
        written = {"one": 1, "four": 2}[name]
        assert collectives(text) == written * sum(axis is not None for axis in axes)
  print("equal")
"""


@pytest.mark.parametrize(
  "names",
  [
    ("one",),
    pytest.param(("four", "gaussian", "half"), marks=pytest.mark.slow),
    pytest.param(("no iteration", "sliced", "closures"), marks=pytest.mark.slow),
  ],
)
def test_spread_over_devices_equals_whole(names):
  assert "equal" in run_on_host_devices(8, SCRIPT.replace("NAMES", repr(names)))


def test_without_axes_it_is_sinkhorn_attention():
  tokens = jax.random.normal(jax.random.key(0), (2, 6, 2, 4))
  found = sequence_sharded_attention(tokens, tokens, tokens, iterations=3)
  wanted = asap_jax.sinkhorn_attention(tokens, tokens, tokens, iterations=3)
  assert jnp.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"query_axis": "a", "key_axis": "a"}, "expected two axes"),
    ({"iterations": 0}, "iterations=0 from start='zero'"),
  ],
)
def test_options_that_make_no_sense(options, message):
  tokens = jnp.ones((1, 4, 2, 4))
  with pytest.raises(ValueError, match=message):
    sequence_sharded_attention(tokens, tokens, tokens, **options)
