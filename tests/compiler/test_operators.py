"""What operators know of themselves."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import asap_jax
from asap_jax.attention.inputs import Activation
from asap_jax.c_transform import plan
from asap_jax.compiler.operators import Sinkhorn


def test_a_teacher_that_stops_early_knows_its_own_duals():
  """The plan is that of the attention function, every sequence stopped by itself."""
  teacher = Sinkhorn(12, tolerance=0.02)
  query, key = (
    jnp.asarray(np.random.default_rng(seed).normal(size=(3, 2, 8, 4)), jnp.float32)
    for seed in (0, 1)
  )
  query = query * jnp.asarray([0.2, 1.0, 3.0])[:, None, None, None]
  seen = Activation(query, key)
  duals, _ = jax.jit(Sinkhorn.duals)(teacher, seen)
  weights = plan(seen.logits, duals)
  tokens = (jnp.swapaxes(x, 1, 2) for x in (query, key, key))
  out = teacher.attention_fn(*tokens, scale=1.0)
  np.testing.assert_allclose(jnp.swapaxes(weights @ key, 1, 2), out, atol=1e-5)
  assert float(jnp.abs(weights.sum(-2) - 1).mean(-1).max()) < 0.1


def test_a_layer_that_stops_early_is_compiled():
  layer = asap_jax.SinkhornMultiHeadAttention(
    2, 8, iterations=9, tolerance=0.05, rngs=nnx.Rngs(0)
  )
  batches = jax.random.normal(jax.random.key(0), (2, 3, 6, 8))
  _, report = asap_jax.compile(layer, batches, Sinkhorn(9), progress=False)
  (of_layer,) = report.layers
  # The teacher's error, with which it stopped, is not that of all its iterations.
  assert 1e-4 < of_layer.teacher_column_error.max() <= 0.05
  assert (of_layer.column_error < 1e-4).all()
  assert of_layer.chosen == "sinkhorn@9, as given"


def test_iterations_from_another_start_are_no_cut_of_the_teacher():
  layer = asap_jax.SinkhornMultiHeadAttention(2, 8, iterations=5, rngs=nnx.Rngs(0))
  batches = jax.random.normal(jax.random.key(0), (2, 3, 6, 8))
  operator = Sinkhorn(2, start="gaussian")
  _, report = asap_jax.compile(layer, batches, operator, progress=False)
  labels = [each.label for each in report.layers[0].alternatives]
  assert len(set(labels)) == len(labels)
  assert report.layers[0].chosen == "sinkhorn@2, as given"
