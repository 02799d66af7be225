"""Closures relative to a teacher's plan, against the closures of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracles

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import advance
from asap_jax.compiler.fitting import relative
from asap_jax.compiler.fitting.relative import Factors
from asap_jax.compiler.operators import Sinkhorn

HEADS, BATCH, N, M, DIM, TEACHER = 2, 3, 7, 9, 4, 6


def activation(masked):
  query, key = (
    jax.random.normal(jax.random.key(i), (BATCH, HEADS, size, DIM))
    for i, size in enumerate((N, M))
  )
  masks = (
    (jnp.arange(N) < 5)[None, None].repeat(BATCH, 0),
    (jnp.arange(M) != 2)[None, None].repeat(BATCH, 0),
  )
  query_mask, key_mask = masks if masked else (None, None)
  return Activation(query, key, None, query_mask, key_mask, None, None)


def factors(most=4):
  random = np.random.default_rng(0)
  shape = HEADS, most
  return Factors(
    jnp.asarray(random.uniform(1.0, 1.6, shape), jnp.float32),
    jnp.asarray(random.uniform(0.0, 0.3, shape), jnp.float32),
  )


def expected_plans(seen, head, batch, dual, count, own):
  """Teacher's and closed plan of one problem in NumPy, of what is present."""
  rows = slice(None) if seen.query_mask is None else np.asarray(seen.query_mask[0, 0])
  columns = slice(None) if seen.key_mask is None else np.asarray(seen.key_mask[0, 0])
  logits = np.float64(seen.logits[batch, head])[rows][:, columns]
  teacher = oracles.plan(
    logits, *oracles.closures(logits, np.zeros(len(logits)), TEACHER)
  )
  duals = oracles.closures(
    logits,
    np.float64(dual)[rows],
    count,
    relaxation=own.relaxation,
    momentum=own.momentum,
  )
  return teacher, oracles.plan(logits, *duals)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_closed_plans_are_those_of_the_logits(masked, count):
  seen = activation(masked)
  problem = relative.relative_of(seen, Sinkhorn(TEACHER))
  duals = jax.random.normal(jax.random.key(5), (HEADS, BATCH, N))
  for head in range(HEADS):
    of_head, own = (
      jax.tree.map(lambda x, head=head: x[head], each) for each in (problem, factors())
    )
    found = relative.closed(of_head, duals[head], count, own)
    kl = tv = 0.0
    for batch in range(BATCH):
      teacher, closed = expected_plans(
        seen, head, batch, duals[head, batch], count, own
      )
      kl += np.sum(teacher * np.log(teacher / closed))
      tv += 0.5 * np.abs(teacher - closed).sum()
    assert float(found.excess) == 0.0
    np.testing.assert_allclose(relative.divergence(of_head, found), kl, rtol=1e-3)
    np.testing.assert_allclose(relative.total_variation(of_head, found), tv, rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_half_a_closure_has_exact_rows_and_the_plan_of_a_biased_softmax(masked):
  seen = activation(masked)
  problem = relative.relative_of(seen, Sinkhorn(TEACHER))
  bias = jax.random.normal(jax.random.key(6), (HEADS, BATCH, M))
  queries, keys = (
    np.ones(size, bool) if mask is None else np.asarray(mask[0, 0])
    for size, mask in zip((N, M), seen.masks, strict=True)
  )
  for head in range(HEADS):
    of_head = jax.tree.map(lambda x, head=head: x[head], problem)
    found = relative.half_closed(of_head, bias[head])
    plans = of_head.plan * jnp.exp(found.phi[..., None] + found.gamma[..., None, :])
    biased = seen.logits[:, head] + bias[head][:, None]
    expected = jax.nn.softmax(jnp.where(keys, biased, -jnp.inf), axis=-1)
    expected = jnp.where(queries[:, None], expected, 0.0)
    np.testing.assert_allclose(plans, expected, atol=2e-5)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_gradients_are_those_of_an_unrolled_loop(count):
  problem = relative.relative_of(activation(masked=True), Sinkhorn(TEACHER))
  problem, own = (jax.tree.map(lambda x: x[0], each) for each in (problem, factors()))
  dual = jax.random.normal(jax.random.key(7), (BATCH, N))

  def unrolled(dual, own):
    phi, _ = relative._bounded(
      relative.centre(dual - problem.duals[0], problem.rows > 0)
    )
    before = phi
    for k in range(count - 1):
      fitted = relative._to_queries(problem, relative._to_keys(problem, phi))
      step = (each[k] for each in own)
      before, phi = phi, advance(before, phi, fitted, *step)
    gamma = relative._to_keys(problem, phi)
    closed = relative.Closed(relative._to_queries(problem, gamma), gamma, jnp.zeros(()))
    return relative.divergence(problem, closed)

  def custom(dual, own):
    return relative.divergence(problem, relative.closed(problem, dual, count, own))

  found, expected = (
    jax.value_and_grad(each, argnums=(0, 1))(dual, own) for each in (custom, unrolled)
  )
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_start_beyond_the_range_counts_as_divergence():
  problem = relative.relative_of(activation(masked=False), Sinkhorn(TEACHER))
  problem, own = (jax.tree.map(lambda x: x[0], each) for each in (problem, factors()))
  dual = 300.0 * jax.random.normal(jax.random.key(7), (BATCH, N))

  def loss(dual):
    return relative.divergence(problem, relative.closed(problem, dual, 2, own))

  value, slope = jax.value_and_grad(loss)(dual)
  assert np.isfinite(value)
  assert value > 100.0
  assert np.isfinite(slope).all()
  assert loss(0.5 * dual) < value
