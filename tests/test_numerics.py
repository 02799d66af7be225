"""Products in the form of each device, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asap_jax.numerics import as_matmul, multiplied_and_summed, narrow_einsum

# Subscripts, and sizes of both factors.
CASES = {
  "projections": ("...nd,...rd->...nr", (2, 3, 5, 7), (3, 4, 7)),
  "weighted sums": ("...rn,...nd->...rd", (3, 4, 5), (2, 3, 5, 7)),
  "moments": ("...ni,...nj->...ij", (2, 5, 3), (2, 5, 4)),
  "matrices": ("...ij,...jk->...ik", (4, 5), (2, 5, 3)),
  "transposed": ("...sr,...sd->...dr", (2, 4, 3), (2, 4, 7)),
}


@pytest.mark.parametrize("form", [multiplied_and_summed, narrow_einsum])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, form):
  subscripts, *sizes = CASES[name]
  random = np.random.default_rng(0)
  factors = [random.normal(size=size) for size in sizes]
  found = form(subscripts, *(jnp.asarray(x, jnp.float32) for x in factors))
  np.testing.assert_allclose(found, np.einsum(subscripts, *factors), atol=1e-5)


def test_half_precision_is_multiplied_and_summed_in_float32():
  tokens = jnp.full((1, 4096), 1.01, jnp.bfloat16)
  for form in (multiplied_and_summed, narrow_einsum):
    found = form("...nd,...rd->...nr", tokens, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 4096 * float(tokens[0, 0]) ** 2, rtol=1e-5)


def test_a_tpu_multiplies_no_matrices():
  factors = jnp.ones((5, 7)), jnp.ones((4, 7))
  narrow = jax.jit(lambda *x: narrow_einsum("...nd,...rd->...nr", *x))
  for platform, wanted in (("tpu", 0), ("cuda", 1), ("cpu", 1)):
    lowered = narrow.trace(*factors).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("dot_general") == wanted


@pytest.mark.parametrize(
  ("subscripts", "left", "right"),
  [
    ("...nd,...md->...nm", (3, 2, 4, 5), (3, 2, 6, 5)),
    ("...nd,...d->...n", (3, 4, 5), (3, 5)),
    ("...n,...nd->...d", (3, 4), (3, 4, 5)),
    ("...hc,hcw->...hw", (3, 2, 5), (2, 5, 6)),
    ("...rn,...nd->...rd", (3, 2, 4), (3, 4, 5)),
    ("...md,...me->...de", (3, 4, 5), (3, 4, 6)),
  ],
)
def test_products_of_matrices_are_the_einsum(subscripts, left, right):
  random = np.random.default_rng(0)
  operands = [random.normal(size=shape).astype(np.float32) for shape in (left, right)]
  found = as_matmul(subscripts, *map(jnp.asarray, operands))
  np.testing.assert_allclose(found, np.einsum(subscripts, *operands), atol=1e-5)
