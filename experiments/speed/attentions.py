"""Attentions that `experiments.speed` measures this package's against.

All of them take queries, keys and values `[batch, length, heads, dim]`, without masks.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import asap_jax

# Pairs of tokens in a block of `blocked_softmax`: 4 MiB of float32.
_BLOCK = 2**20


def blocked_softmax(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Softmax attention, some heads at a time, so that they stay in a CPU's cache.

  Rows are divided by their sums after the product with the values: the fastest form
  that plain XLA has on a CPU, and so the fair one to compare with.
  """
  batch, length, heads, features = value.shape
  total, pairs = batch * heads, query.shape[1] * length
  # Blocks of one size, so that no remainder has to be compiled by itself.
  most = max(1, min(total, _BLOCK // pairs))
  size = next(s for s in range(most, 0, -1) if total % s == 0)

  def attend(block):
    query, key, value = block
    logits = jnp.einsum("bnd,bmd->bnm", query, key)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    out = jnp.einsum("bnm,bmv->bnv", weights.astype(value.dtype), value)
    return out.astype(jnp.float32) / weights.sum(-1, keepdims=True)

  arrays = *heads_first(query, key), jnp.moveaxis(value, -2, -3)
  blocks = tuple(x.reshape(-1, size, *x.shape[-2:]) for x in arrays)
  out = jax.lax.map(attend, blocks).reshape(batch, heads, -1, features)
  return jnp.moveaxis(out, -3, -2).astype(value.dtype)


def log_sinkhorn(
  query: jax.Array, key: jax.Array, value: jax.Array, iterations: int
) -> jax.Array:
  """Sinkhorn attention in the log domain: two exponentials of a matrix an iteration."""
  logits = jnp.einsum("bhnd,bhmd->bhnm", *heads_first(query, key))
  duals = asap_jax.closures(logits, jnp.zeros(logits.shape[:-1]), iterations)
  return _apply(logits, duals, value)


def unrolled_sinkhorn(
  query: jax.Array, key: jax.Array, value: jax.Array, iterations: int
) -> jax.Array:
  """Sinkhorn attention by OTT-JAX, differentiated through its own unrolled loop."""
  from ott.geometry import geometry
  from ott.problems.linear import linear_problem
  from ott.solvers.linear import sinkhorn

  solver = sinkhorn.Sinkhorn(
    # One block of iterations: over several, the gradient of OTT 0.6 is wrong.
    inner_iterations=iterations,
    min_iterations=iterations,
    max_iterations=iterations,
    threshold=0.0,
    implicit_diff=None,
  )

  @jax.vmap
  @jax.vmap
  def solve(logits):
    cost = geometry.Geometry(cost_matrix=-logits, epsilon=1.0)
    output = solver(linear_problem.LinearProblem(cost))
    # OTT's plan sums to one, a plan of attention to the number of queries.
    return asap_jax.Duals(output.f, output.g + math.log(logits.shape[0]))

  logits = jnp.einsum("bhnd,bhmd->bhnm", *heads_first(query, key))
  return _apply(logits, solve(logits), value)


def training_step(attention: Callable[..., jax.Array]) -> Callable[..., Any]:
  """A scalar loss of an attention's output, with its gradients in all three inputs."""

  def loss(query, key, value):
    return jnp.mean(jnp.square(attention(query, key, value).astype(jnp.float32)))

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


def heads_first(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[batch, heads, length, dim]` in float32, such that logits are query key^T."""
  query, key = (jnp.moveaxis(x, -2, -3).astype(jnp.float32) for x in (query, key))
  return query * query.shape[-1] ** -0.5, key


def _apply(logits: jax.Array, duals: asap_jax.Duals, value: jax.Array) -> jax.Array:
  out = asap_jax.c_transform.apply_plan(logits, duals, jnp.moveaxis(value, -2, -3))
  return jnp.moveaxis(out, -3, -2)
