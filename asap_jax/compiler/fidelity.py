"""How close an attention operator comes to its teacher on recorded activations."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax import metrics
from asap_jax.attention.functions import sinkhorn_attention, softmax_attention
from asap_jax.attention.implementations.xla import scaled_attention
from asap_jax.c_transform.entropic import (
  Duals,
  apply_plan,
  c_transform,
  closure,
  closures,
  plan,
)
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.compiler.sites import Activation, bound_arguments
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import centre, valid_pairs
from asap_jax.teacher.sinkhorn import sinkhorn_duals, sinkhorn_source_dual


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


class Operator(NamedTuple):
  """An attention operator reduced to its duals: a pytree that picks a function.

  Attributes:
    kind: `"asap"`, `"sinkhorn"`, `"ott"` or `"softmax"`. `"sinkhorn"` and `"ott"` are
      one plan; they differ in the implementation whose time is taken.
    iterations: full iterations, of `"sinkhorn"` and `"ott"`.
    dual_map: of `"asap"`.
  """

  kind: str
  iterations: int = 0
  dual_map: DualMap | None = None


def operator_of(attention_fn: Callable[..., jax.Array]) -> Operator:
  """The operator of one of this package's attention functions, bound or compiled.

  Raises:
    ValueError: for any other function.
  """
  dual_map = getattr(attention_fn, "dual_map", None)
  if isinstance(dual_map, DualMap):
    return Operator("asap", dual_map=dual_map)
  bound = bound_arguments(attention_fn, sinkhorn_attention)
  if bound is not None:
    kind = "ott" if bound.get("implementation", "ott") == "ott" else "sinkhorn"
    return Operator(kind, iterations=bound["iterations"])
  if bound_arguments(attention_fn, softmax_attention) is not None:
    return Operator("softmax")
  raise ValueError(
    f"attention_fn={attention_fn!r}: expected an AsapAttention, or sinkhorn_attention "
    "or softmax_attention or a partial of them"
  )


def fidelity_sums(
  activation: Activation, operators: Sequence[Operator], iterations: int
) -> list[FidelitySums]:
  """Compares operators' plans with that of `iterations` of Sinkhorn, on one call."""
  source = _source(activation, iterations)
  sums = [
    _fidelity_sums(activation, source, dual_map, kind, own)
    for kind, own, dual_map in operators
  ]
  return [
    FidelitySums(*(np.asarray(value, np.float64) for value in of_one))
    for of_one in sums
  ]


def operator_milliseconds(
  activation: Activation, operators: Sequence[Operator], repeats: int = 5
) -> list[float]:
  """Median times of one attention call of each operator; warm, in turn.

  From queries, keys and values (the keys serve as values) to outputs, without forming
  a doubly stochastic plan (`asap_jax.attention.implementations.xla`).
  """
  times: list[list[float]] = [[] for _ in operators]
  for repeat in range(repeats + 1):
    for (kind, iterations, dual_map), taken in zip(operators, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(_output(activation, dual_map, kind, iterations))
      if repeat:  # the first one compiles
        taken.append(1e3 * (time.perf_counter() - start))
  return [statistics.median(taken) for taken in times]


def plan_of(activation: Activation, operator: Operator) -> jax.Array:
  """Attention weights of an operator, `[batch, heads, n, m]`."""
  kind, iterations, dual_map = operator
  return _plan(activation, dual_map, kind, iterations)


def _duals(
  activation: Activation, dual_map: DualMap | None, kind: str, iterations: int
) -> tuple[Duals, jax.Array | None]:
  """Duals of the operator's plan, and the source dual if it predicts one."""
  logits = activation.logits
  masks = activation.query_mask, activation.key_mask
  if kind == "asap":
    assert dual_map is not None
    tokens, products = (activation.query, activation.key), activation.products
    f = predict_dual(dual_map, *tokens, *masks, products=products)
    relaxation = dual_map.relaxation
    return closures(logits, f, dual_map.closures, *masks, relaxation=relaxation), f
  if kind in ("sinkhorn", "ott"):
    start = jnp.zeros(logits.shape[:-1], logits.dtype)
    return scaled_plan(logits, start, iterations, *masks).duals, None
  g = jnp.zeros((*logits.shape[:-2], logits.shape[-1]))
  return Duals(c_transform(logits, g, *masks, to="query"), g), None


@functools.partial(jax.jit, static_argnames=("kind", "iterations"))
def _plan(activation, dual_map, kind, iterations):
  duals, _ = _duals(activation, dual_map, kind, iterations)
  return plan(activation.logits, duals, activation.query_mask, activation.key_mask)


@functools.partial(jax.jit, static_argnames=("kind", "iterations"))
def _output(activation, dual_map, kind, iterations):
  query, key, bias, *masks = activation[:5]
  if kind == "softmax":
    pairs = valid_pairs(*masks)
    return jax.nn.softmax(activation.logits, axis=-1, where=pairs) @ key
  if kind == "ott":
    duals = sinkhorn_duals(activation.logits, iterations, *masks)
    return apply_plan(activation.logits, duals, key, *masks)
  # Each other kind in its fastest form: the baseline is cut Sinkhorn at equal time.
  f: jax.Array | Callable[..., jax.Array]
  count, relaxation = iterations, None
  if kind == "asap":
    f = functools.partial(predict_dual, dual_map)
    count, relaxation = dual_map.closures, dual_map.relaxation
  else:
    f = jnp.zeros(query.shape[:-1], query.dtype)
  return scaled_attention(
    query, key, key, f, count, *masks, bias=bias, relaxation=relaxation
  )


@functools.partial(jax.jit, static_argnames=("iterations",))
def _source(activation, iterations):
  """The dual that the teacher's last iteration consumed."""
  masks = activation.query_mask, activation.key_mask
  return sinkhorn_source_dual(activation.logits, iterations, *masks)


@functools.partial(jax.jit, static_argnames=("kind", "own"))
def _fidelity_sums(activation, source, dual_map, kind, own):
  logits = activation.logits
  masks = activation.query_mask, activation.key_mask
  teacher = plan(logits, closure(logits, source, *masks), *masks)
  duals, predicted = _duals(activation, dual_map, kind, own)
  compared = plan(logits, duals, *masks)
  target = centre(source, masks[0])
  residual = jnp.zeros_like(target) if predicted is None else target - predicted
  rows, columns = (jnp.ones((), bool) if mask is None else mask for mask in masks)

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
