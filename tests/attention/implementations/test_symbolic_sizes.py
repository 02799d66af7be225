"""One program for all sizes gives what one for each of them does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.served import DIM, HEADS, LINEAR, dual_map

from asap_jax import asap_attention, sinkhorn_attention, softmax_attention

RANDOM = np.random.default_rng(0)
# Shapes in annotations are of numbers alone.
pytestmark = pytest.mark.usefixtures("unchecked")


MAPS = {
  "linear": dual_map(*LINEAR),
  "linear@3": dual_map(*LINEAR, closures=3),
  "slices": dual_map("potentials", *LINEAR),
  "network": dual_map("potentials", "query", "cumulants", "transport", hidden=4),
  "half": dual_map(*LINEAR, side="key", half=True),
  "gaussian": dual_map(*LINEAR, "gaussian"),
}
ATTENTION = {
  "softmax": softmax_attention,
  **{
    f"{name} {implementation}": functools.partial(
      asap_attention, dual_map=each, implementation=implementation
    )
    for name, each in MAPS.items()
    for implementation in (None, "chunked")
  },
  **{
    f"sinkhorn@3 {name}": functools.partial(
      sinkhorn_attention, iterations=3, implementation=name
    )
    for name in (None, "ott", "chunked")
  },
  **{
    f"sinkhorn {options}": functools.partial(sinkhorn_attention, **options)
    for options in (
      {"iterations": 2, "start": "gaussian"},
      {"iterations": 0, "start": "gaussian_full"},
      {"iterations": 3, "relaxation": 1.5},
      {"iterations": 3, "tolerance": 0.01},
      {"iterations": 3, "tolerance": 0.01, "implementation": "chunked"},
    )
  },
}
QUICK = ("softmax", "sinkhorn@3 None", "slices None", "linear@3 chunked")


def tokens(batch, length):
  shape = batch, length, HEADS, DIM
  return tuple(jnp.asarray(2 * RANDOM.normal(size=shape), jnp.float32) for _ in "qkv")


def masked(attend, query, key, value, valid):
  return attend(query, key, value, mask=nnx.make_attention_mask(valid, valid))


def packed(attend, query, key, value, ids):
  return attend(query, key, value, segment_ids=ids, max_segments=2)


def compare(function, arguments, symbolic, sizes, constraints=()):
  """Exported once, and run on batches and lengths of these sizes."""
  scope = jax.export.SymbolicScope(constraints)
  shapes = jax.export.symbolic_args_specs(arguments, symbolic, scope=scope)
  exported = jax.export.export(jax.jit(function), platforms=["cpu"])(*shapes)
  for batch, length in sizes:
    given = [x[:batch, :length] for x in arguments]
    np.testing.assert_allclose(
      exported.call(*given), jax.jit(function)(*given), atol=3e-6
    )


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in ATTENTION
  ],
)
def test_batches_of_any_size(name):
  valid = jnp.arange(7) < jnp.asarray([[5], [3], [7]])
  attend = functools.partial(masked, ATTENTION[name])
  compare(attend, (*tokens(3, 7), valid), "b, ...", [(1, 7)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_batches_and_lengths_of_any_size(name):
  compare(ATTENTION[name], tokens(3, 7), "b, n, ...", [(2, 4)], ["n >= 2"])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("symbolic", ["b, ...", "b, n, ..."])
def test_packed_sequences_of_any_size(symbolic, implementation):
  attend = functools.partial(
    sinkhorn_attention, iterations=3, implementation=implementation
  )
  ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 2], [1] * 7])
  function = functools.partial(packed, attend)
  sizes = [(3, 7), (2, 6)] if "n" in symbolic else [(3, 7), (2, 7)]
  known = ["n >= 2"] if "n" in symbolic else []
  compare(function, (*tokens(3, 7), ids), symbolic, sizes, known)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_lengths_beyond_one_chunk(implementation):
  attend = functools.partial(
    sinkhorn_attention, iterations=2, implementation=implementation
  )
  compare(attend, tokens(1, 600), "b, n, ...", [(1, 600), (1, 512)], ["n >= 2"])


def test_what_is_known_of_a_length_counts():
  """A bound brings back the form of short sequences, which has no blocks."""

  def loops(*constraints):
    scope = jax.export.SymbolicScope(("n >= 2", *constraints))
    shapes = jax.export.symbolic_args_specs(tokens(3, 7), "b, n, ...", scope=scope)
    attend = ATTENTION["linear None"]
    exported = jax.export.export(jax.jit(attend), platforms=["cpu"])(*shapes)
    return exported.mlir_module().count("stablehlo.while")

  assert loops() > loops("n <= 64") == 0


def test_a_fused_kernel_refuses_sizes_that_are_not_known():
  def attend(query, key, value):
    return sinkhorn_attention(query, key, value, implementation="cudnn")

  shapes = jax.export.symbolic_args_specs(tokens(3, 7), "b, ...")
  with pytest.raises(ValueError, match=r"implementation='cudnn' cannot serve: sizes"):
    jax.export.export(jax.jit(attend), platforms=["cuda"])(*shapes)
