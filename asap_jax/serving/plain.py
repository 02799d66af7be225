"""Attention in the few operators that ONNX has: products, maxima, softmax.

All is in the log domain, right for any logits: there are neither loops that data end
nor branches. What a closure asks of logits is one product and one softmax. The dual is
one coordinate more of that product, which costs no pass over the pairs; and the sums
come out of a softmax over the last axis, which ONNX Runtime has in vector instructions,
where it adds exponentials one by one (60 sequences of 64 tokens, 2 heads, one core: 1.0
ms for a closure, and 2.6 by ReduceLogSumExp).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.functions import check_heads, check_iterations
from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import inputs_of
from asap_jax.c_transform.entropic import LOG_ZERO, advance, check_closures
from asap_jax.c_transform.iterates import column_shift
from asap_jax.dual_map.predict import DualMap, Steps, predict_dual


def plain_attention(name: str, given: dict[str, Any]) -> Array:
  """What an attention function returns, for `asap_jax.attention.signature.answering`.

  Args:
    name: of the function.
    given: all its arguments.

  Raises:
    ValueError: for functions and arguments that have no such form.
  """
  if name not in ("softmax_attention", "sinkhorn_attention", "asap_attention"):
    raise ValueError(
      f"{name} has no form for ONNX: expected softmax_attention, sinkhorn_attention or "
      "asap_attention"
    )
  for argument in ("segment_ids", "max_segments"):
    if given[argument] is not None:
      raise ValueError(
        f"{argument}: packed sequences have no form for ONNX; expected None, and each "
        "sequence in an element of the batch"
      )
  for argument in ("query_weights", "key_weights"):
    if given[argument] is not None:
      raise ValueError(
        f"{argument}: unequal masses have no form for ONNX; expected None"
      )
  inputs = inputs_of(given, any_mask=name == "softmax_attention")
  if name == "softmax_attention":
    return inputs.attend(PlainSoftmax(inputs))
  if name == "asap_attention":
    return inputs.attend(_compiled(inputs, given["dual_map"]))
  names = "iterations", "start", "relaxation", "tolerance"
  return inputs.attend(_sinkhorn(inputs, *(given[each] for each in names)))


def _sinkhorn(
  inputs: Inputs,
  iterations: int,
  start: Any,
  relaxation: float,
  tolerance: float | None,
) -> "PlainPlan":
  check_iterations(iterations, start, relaxation, tolerance)
  side: Any = "query" if iterations else "key"
  factors = None if relaxation == 1.0 else jnp.full((iterations - 1,), relaxation)
  steps = Steps(relaxation=factors, momentum=None, side=side)
  dual = inputs.starting_dual(start, side)
  return PlainPlan(inputs, dual, iterations, steps, tolerance)


def _compiled(inputs: Inputs, dual_map: DualMap) -> "PlainPlan":
  check_heads(dual_map, inputs)
  check_closures(dual_map.closures, **dual_map.steps)
  # jax2onnx takes the first axis of weights for that of the batch, where it is open.
  dual_map = jax.tree.map(lambda leaf: leaf[None], dual_map)
  dual = predict_dual(dual_map, inputs.query, inputs.key, *inputs.masks)
  return PlainPlan(inputs, dual, dual_map.closures, dual_map.steps)


@dataclasses.dataclass(frozen=True)
class PlainSoftmax:
  """Weights of softmax.

  Attributes:
    inputs: queries, keys, bias and the pairs that may attend.
  """

  inputs: Inputs

  def dense(self) -> Array:
    """Weights, `[batch..., heads, n, m]`; rows that may attend to nothing are zero."""
    inputs = self.inputs
    scores, bias = _products(inputs.query, inputs.key), inputs.bias
    if inputs.allowed is None:
      return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    if bias is not None:
      scores = scores + jnp.where(inputs.allowed, bias, 0.0)
    weights = jax.nn.softmax(jnp.where(inputs.allowed, scores, LOG_ZERO), axis=-1)
    return jnp.where(inputs.allowed, weights, 0.0)

  def apply(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    """Weights times values."""
    return jnp.matmul(self.dense(), value, precision=precision)


@dataclasses.dataclass(frozen=True)
class PlainPlan:
  """The plan of some closures of a dual.

  Attributes:
    inputs: queries, keys, bias and masks.
    dual: to start at.
    count: closures, all of them written out.
    steps: what is between them and whose dual it is, as in `asap_jax.closures`.
    tolerance: of iterations that stop early: they are computed and not taken.
  """

  inputs: Inputs
  dual: Array
  count: int
  steps: Steps
  tolerance: float | None = None

  def dense(self) -> Array:
    """Weights, `[batch..., heads, n, m]`."""
    weights = jax.nn.softmax(self._scores(self._key_dual()), axis=-1)
    valid = self.inputs.query_mask
    return weights if valid is None else jnp.where(valid[..., None], weights, 0.0)

  def apply(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    """Weights times values."""
    weights = jax.nn.softmax(self._scores(self._key_dual()), axis=-1)
    out = jnp.matmul(weights.astype(value.dtype), value, precision=precision)
    valid = self.inputs.query_mask
    return out if valid is None else jnp.where(valid[..., None], out, 0.0)

  def _key_dual(self) -> Array:
    """g of the last closure; constants that all keys share are left out."""
    g = dual = self.dual
    if self.steps["side"] == "key":
      if self.count == 0:
        return g
      dual = self._to_queries(g)
    if self.tolerance is not None:
      return self._stopped(dual, self.tolerance)
    f = before = dual
    for k in range(self.count - 1):
      closed = self._to_queries(self._to_keys(f))
      factors = (
        None if x is None else x[..., k]
        for x in (self.steps["relaxation"], self.steps["momentum"])
      )
      before, f = f, advance(before, f, closed, *factors)
    return self._to_keys(f)

  def _stopped(self, f: Array, tolerance: float) -> Array:
    """g of iterations that end where the error of the columns is small."""
    g = self._to_keys(f)
    columns = self.inputs.key_mask
    columns = jnp.ones_like(g) if columns is None else columns * jnp.ones_like(g)
    active = jnp.ones_like(g[..., :1], bool)
    for _ in range(self.count - 1):
      after = self._to_keys(self._to_queries(g))
      # g lacks the logarithm of the marginals, which its change does not contain.
      error = column_shift(g, after, columns)[..., None]
      active = active & (error > tolerance)
      g = jnp.where(active, after, g)
    return g

  @functools.cached_property
  def _queries(self) -> Array:
    return _extended(self.inputs.query)

  @functools.cached_property
  def _keys(self) -> Array:
    return _extended(self.inputs.key)

  def _to_keys(self, f: Array) -> Array:
    inputs = self.inputs
    scores = _with_dual(self._keys, inputs.query, _kept(f, inputs.query_mask))
    bias = inputs.bias_of_pairs
    if bias is not None:
      bias = jnp.broadcast_to(bias, jnp.swapaxes(scores, -1, -2).shape)
      scores = scores + jnp.swapaxes(bias, -1, -2)
    return -_log_sums(scores)

  def _to_queries(self, g: Array) -> Array:
    return -_log_sums(self._scores(g))

  def _scores(self, g: Array) -> Array:
    """S + g, far below all others at absent keys."""
    inputs = self.inputs
    scores = _with_dual(self._queries, inputs.key, _kept(g, inputs.key_mask))
    bias = inputs.bias_of_pairs
    return scores if bias is None else scores + bias


def _kept(dual: Array, valid: Array | None) -> Array:
  return dual if valid is None else jnp.where(valid, dual, LOG_ZERO)


def _products(left: Array, right: Array) -> Array:
  """left right^T."""
  return jnp.matmul(left, jnp.swapaxes(right, -1, -2), precision="highest")


def _extended(tokens: Array) -> Array:
  """Tokens with a one behind their coordinates, which a dual of others multiplies."""
  return jnp.concatenate([tokens, jnp.ones_like(tokens[..., :1])], axis=-1)


def _with_dual(extended: Array, others: Array, dual: Array) -> Array:
  """Products of tokens and others, to which the dual of the others is added."""
  return _products(extended, jnp.concatenate([others, dual[..., None]], axis=-1))


def _log_sums(scores: Array) -> Array:
  """Log-sum-exp over the last axis, of the numbers that softmax makes on its way."""
  return scores.max(-1) - jax.nn.log_softmax(scores, axis=-1).max(-1)
