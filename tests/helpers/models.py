"""A small Transformer with Sinkhorn attention, and inputs for it."""

import functools
from unittest import mock

import jax
import numpy as np
from flax import nnx

import asap_jax
from asap_jax.compiler import api
from asap_jax.dual_map.features import FEATURES

HEADS, WIDTH, TOKENS, ITERATIONS = 2, 16, 10, 5


class Block(nnx.Module):
  def __init__(self, width, rngs, **options):
    self.attention = asap_jax.SinkhornMultiHeadAttention(
      HEADS,
      width,
      iterations=ITERATIONS,
      # Logits large enough for one iteration not to be nearly converged.
      kernel_init=nnx.initializers.normal(1.7 / width**0.5),
      out_kernel_init=nnx.initializers.normal(0.3),
      rngs=rngs,
      **options,
    )

  def __call__(self, x, mask=None):
    return x + self.attention(x, mask=mask)


class Toy(nnx.Module):
  def __init__(self, rngs, width=WIDTH, depth=2, **options):
    self.blocks = nnx.List([Block(width, rngs, **options) for _ in range(depth)])

  def __call__(self, x, mask=None):
    for block in self.blocks:
      x = block(x, mask)
    return x


def toy(seed=0, **options):
  return Toy(nnx.Rngs(seed), **options)


@functools.cache
def batches(count=6, size=16):
  """Tokens around a few common prototypes, so that sequences resemble each other."""
  random = np.random.default_rng(0)
  prototypes = random.normal(size=(4, WIDTH))
  kinds = random.integers(4, size=(count, size, TOKENS))
  noise = random.normal(size=(count, size, TOKENS, WIDTH))
  return list(jax.numpy.asarray(prototypes[kinds] + 0.5 * noise, np.float32))


@functools.cache
def teacher():
  """The toy model that `compiled` compiles."""
  return toy()


@functools.cache
def compiled():
  """The toy model compiled in the plain form, shared by tests that do not change it."""
  return compile_recipe(teacher(), batches(), 4, features=FEATURES, refine_steps=0)


def compile_recipe(model, batches, slices=8, *, progress=False, **options):
  """`asap_jax.compile` with a recipe of these options, those of the call aside."""
  own = {name: options.pop(name) for name in ("call", "seed") if name in options}
  recipe = asap_jax.Recipe(slices=slices, **options)
  # Times of whole models take four programs to compile.
  with mock.patch.object(api, "model_milliseconds", return_value={}):
    return asap_jax.compile(model, batches, recipe, progress=progress, **own)


@nnx.jit
def forward(model, x):
  return model(x)


def arrays(model):
  """Every array of a model's state, PRNG keys as data."""
  return [
    jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x in jax.tree.leaves(nnx.state(model))
  ]


def assert_same_state(one, other):
  for a, b in zip(arrays(one), arrays(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
