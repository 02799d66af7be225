"""How close an attention operator comes to its teacher on recorded activations."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax import metrics
from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import closure, plan
from asap_jax.compiler.operators import Operator, Sinkhorn
from asap_jax.masses import centre, valid


class FidelitySums(NamedTuple):
  """Sums over rows and columns of plans, `[heads]`, float64; add those of batches.

  Attributes:
    tv: total variation to the teacher's rows.
    kl: KL(teacher || operator) of the rows.
    rows: their number.
    column_error: |column sum / target - 1| of the operator.
    teacher_column_error: the same of the teacher.
    columns: their number.
    residual: (f_hat - f)^2, centred; zero for operators that predict no dual.
    power: f^2 of the teacher, centred.
  """

  tv: np.ndarray
  kl: np.ndarray
  rows: np.ndarray
  column_error: np.ndarray
  teacher_column_error: np.ndarray
  columns: np.ndarray
  residual: np.ndarray
  power: np.ndarray

  def __add__(self, other: "FidelitySums") -> "FidelitySums":  # type: ignore[override]
    return FidelitySums(*(a + b for a, b in zip(self, other, strict=True)))


def fidelity_sums(
  activation: Activation, operators: Sequence[Operator], teacher: Sinkhorn
) -> list[FidelitySums]:
  """Sums that compare operators' plans with those of a teacher, on one call."""
  source = _source(activation, teacher)
  return [
    FidelitySums(*(np.asarray(value, np.float64) for value in found))
    for found in (_fidelity_sums(activation, source, each) for each in operators)
  ]


@jax.jit
def plan_of(activation: Activation, operator: Operator) -> jax.Array:
  """Attention weights of an operator, `[batch, heads, n, m]`."""
  duals, _ = operator.duals(activation)
  return plan(activation.logits, duals, *activation.masks)


@jax.jit
def _source(activation, teacher):
  return teacher.source(activation)


@jax.jit
def _fidelity_sums(activation, source, operator):
  logits, masks = activation.logits, activation.masks
  teacher = plan(logits, closure(logits, source, *masks), *masks)
  duals, predicted = operator.duals(activation)
  compared = plan(logits, duals, *masks)
  target = centre(source, masks[0])
  residual = jnp.zeros_like(target) if predicted is None else target - predicted
  rows, columns = (
    jnp.ones((), bool) if mask is None else valid(mask) for mask in masks
  )

  def total(values, keep):
    return jnp.where(keep, values, 0.0).sum((0, 2))

  return FidelitySums(
    tv=total(metrics.total_variation(compared, teacher), rows),
    kl=total(metrics.kl_divergence(compared, teacher), rows),
    rows=total(jnp.ones_like(target), rows),
    column_error=total(metrics.column_error(compared, *masks), columns),
    teacher_column_error=total(metrics.column_error(teacher, *masks), columns),
    columns=total(jnp.ones_like(logits[..., 0, :]), columns),
    residual=total(residual**2, rows),
    power=total(target**2, rows),
  )
