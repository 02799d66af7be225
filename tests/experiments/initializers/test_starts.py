"""Starts that are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.initializers.clouds import FAMILIES
from experiments.initializers.solving import iterated, started
from experiments.initializers.starts import GaussianInitializer


@pytest.mark.slow
def test_ott_gaussian_start_serves_both_costs():
  # More points than dimensions, for Gaussians that are not flat.
  clouds = FAMILIES["attention, modest logits"].problems(3, 64, 0, test=True)
  clouds = jax.tree.map(jnp.asarray, clouds)
  start = GaussianInitializer()
  product, squared = (
    started(clouds, start, epsilon, cost)
    for epsilon, cost in ((1.0, "product"), (2.0, "squared"))
  )
  expected = (squared - jnp.sum(clouds.x**2, -1)) / 2
  np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)
  # The two problems have the same plan, so that a start is worth the same in both.
  counts = [
    iterated(clouds, f, epsilon, cost, 1e-3).iterations
    for f, epsilon, cost in ((product, 1.0, "product"), (squared, 2.0, "squared"))
  ]
  np.testing.assert_array_equal(*counts)
