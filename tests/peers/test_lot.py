"""What LOTFormer claims: doubly stochastic, of low rank, in linear time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.peer_cases import (
  CASES,
  DIM,
  HEADS,
  KEY,
  KEY_MASK,
  PIVOT,
  QUERY,
  QUERY_MASK,
  RANK,
  VALUE,
  forms_matrix,
  normal,
  sown_weights,
)

from asap_jax.metrics import column_error, row_error
from asap_jax.peers import Pivot, lot_attention

INPUTS = QUERY, KEY, VALUE
LOT = CASES["lot"]


@pytest.mark.parametrize(("iterations", "bound"), [(1, None), (200, 1e-3)])
def test_rows_are_exact_and_columns_at_convergence(iterations, bound):
  function = functools.partial(lot_attention, pivot=PIVOT, iterations=iterations)
  weights = sown_weights(function, *INPUTS, mask=LOT.mask)
  rows = jnp.where(QUERY_MASK[:, None], row_error(weights), weights.sum(-1))
  np.testing.assert_allclose(rows, 0, atol=1e-5)
  error = column_error(weights, QUERY_MASK[:, None], KEY_MASK[:, None]).max()
  assert error > 1e-2 if bound is None else error < bound


def test_rank_is_that_of_the_pivot():
  inputs = [normal(1, 12, HEADS, DIM) for _ in range(3)]
  weights = sown_weights(functools.partial(lot_attention, pivot=PIVOT), *inputs)
  values = np.linalg.svd(np.float64(weights), compute_uv=False)
  assert (values[..., RANK:] < 1e-6).all()
  assert (values[..., 1] > 1e-3).all()


def test_no_matrix_of_queries_by_keys_is_formed():
  query, key = normal(1, 31, HEADS, DIM), normal(1, 37, HEADS, DIM)
  assert not forms_matrix(
    functools.partial(lot_attention, pivot=PIVOT), query, key, key
  )


@pytest.mark.slow
def test_pivot_without_mass_is_as_if_absent():
  masses = PIVOT.masses.at[:, 1].set(-1e3)
  keep = np.asarray([0, 2])
  present = Pivot(PIVOT.points[:, keep], PIVOT.masses[:, keep])
  actual, expected = (
    LOT(*INPUTS, mask=LOT.mask, pivot=pivot)
    for pivot in (Pivot(PIVOT.points, masses), present)
  )
  np.testing.assert_allclose(actual, expected, atol=1e-5)
  (_, slopes), _ = LOT.gradient(INPUTS, {"pivot": Pivot(PIVOT.points, masses)})
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes))


def test_logits_of_masses_are_defined_up_to_a_constant():
  moved = Pivot(PIVOT.points, PIVOT.masses + 5.0)
  np.testing.assert_allclose(LOT(*INPUTS, pivot=moved), LOT(*INPUTS), atol=1e-5)


def test_arguments_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"pivot has points \(2, 3, 4\) and masses"):
    lot_attention(*INPUTS, pivot=Pivot(PIVOT.points, PIVOT.masses[:, :2]))
  with pytest.raises(ValueError, match=r"expected \[2, r, 4\] and \[2, r\]"):
    lot_attention(*INPUTS, pivot=Pivot(PIVOT.points[:1], PIVOT.masses[:1]))
  with pytest.raises(ValueError, match=r"iterations=0: expected at least one"):
    lot_attention(*INPUTS, pivot=PIVOT, iterations=0)
  with pytest.raises(ValueError, match=r"bias: lot_attention has no logits"):
    lot_attention(*INPUTS, jnp.zeros(()), pivot=PIVOT)
