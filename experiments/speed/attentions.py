"""Attentions that `experiments.speed` measures this package's against.

All of them take queries, keys and values `[batch, length, heads, dim]`, and a mask of
pairs of valid tokens `[batch, 1, length, length]` or `None`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import asap_jax

# Pairs of tokens in a block of `blocked_softmax`: 4 MiB of float32.
_BLOCK = 2**20


def blocked_softmax(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
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
    query, key, value, valid = block
    logits = jnp.einsum("bnd,bmd->bnm", query, key)
    if valid is not None:
      logits = jnp.where(valid[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    out = jnp.einsum("bnm,bmv->bnv", weights.astype(value.dtype), value)
    return out.astype(jnp.float32) / weights.sum(-1, keepdims=True)

  arrays = *heads_first(query, key), jnp.moveaxis(value, -2, -3)
  valid = valid_tokens(mask)
  of_heads = None if valid is None else jnp.repeat(valid, heads, 0)
  blocks = jax.tree.map(
    lambda x: x.reshape(-1, size, *x.shape[1:]),
    (*(x.reshape(total, *x.shape[-2:]) for x in arrays), of_heads),
  )
  out = jax.lax.map(attend, blocks).reshape(batch, heads, -1, features)
  out = jnp.moveaxis(out, -3, -2)
  if valid is not None:
    out = jnp.where(valid[..., None, None], out, 0.0)
  return out.astype(value.dtype)


def log_sinkhorn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  iterations: int,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Sinkhorn attention in the log domain: two exponentials of a matrix an iteration."""
  logits = jnp.einsum("bhnd,bhmd->bhnm", *heads_first(query, key))
  valid = valid_tokens(mask)
  masks = (None if valid is None else valid[:, None],) * 2
  zeros = jnp.zeros(logits.shape[:-1])
  duals = asap_jax.closures(logits, zeros, iterations, *masks)
  return _apply(logits, duals, value, masks)


def unrolled_sinkhorn(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  iterations: int,
  mask: jax.Array | None = None,
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

  if mask is not None:
    raise ValueError("OTT-JAX unrolled is not set up for a mask here")
  logits = jnp.einsum("bhnd,bhmd->bhnm", *heads_first(query, key))
  return _apply(logits, solve(logits), value)


def training_step(attention: Callable[..., jax.Array]) -> Callable[..., Any]:
  """A scalar loss of an attention's output, with its gradients in all three inputs."""

  def loss(query, key, value, mask=None):
    out = attention(query, key, value, mask=mask)
    return jnp.mean(jnp.square(out.astype(jnp.float32)))

  return jax.value_and_grad(loss, argnums=(0, 1, 2))


def heads_first(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`[batch, heads, length, dim]` in float32, such that logits are query key^T."""
  query, key = (jnp.moveaxis(x, -2, -3).astype(jnp.float32) for x in (query, key))
  return query * query.shape[-1] ** -0.5, key


def valid_tokens(mask: jax.Array | None) -> jax.Array | None:
  """Valid tokens `[batch, length]` of a mask of their pairs."""
  return None if mask is None else mask[:, 0].any(-1)


def _apply(
  logits: jax.Array,
  duals: asap_jax.Duals,
  value: jax.Array,
  masks: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> jax.Array:
  value = jnp.moveaxis(value, -2, -3)
  out = asap_jax.c_transform.apply_plan(logits, duals, value, *masks)
  return jnp.moveaxis(out, -3, -2)
