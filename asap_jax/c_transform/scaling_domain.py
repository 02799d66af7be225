"""Closures with one exponential: Sinkhorn in the scaling domain, kept in range.

The plan is u_i E_ij v_j with a kernel E = exp(S + F_i + G_j), so that a closure is two
matrix-vector products, v = c / (E^T u) and u = r / (E v), instead of two passes of
exponentials. F and G are what has been absorbed into the kernel (Schmitzer, 2019,
"Stabilized sparse scaling algorithms for entropy regularized transport problems"): the
start f and, for G, minus the maxima of its columns, which makes the first column sums
exact whatever the logits. Where later sums leave the range in which float32 loses
nothing, the half-iteration is done anew with the current dual absorbed, at the price of
one more exponential.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.c_transform.entropic import (
  Duals,
  check_closures,
  check_logits,
  column_sums,
  row_sums,
)
from asap_jax.masses import Weights, valid_pairs, zero_invalid

# Entries of the kernel below the smallest normal number are lost; together they may be
# this share of a sum.
_LOST = 1e-7
# Bounds scalings from above; their products with sums stay below the largest float32.
_LARGEST = 1e30
_LOG_LARGEST = 69.08
# Stands for log 0, as in `c_transform`.
_LOG_ZERO = -1e30


class ScaledPlan(NamedTuple):
  """Attention weights A = u E v in factors, zero on absent points.

  Attributes:
    kernel: E, `[..., n, m]`.
    rows: u, `[..., n]`.
    columns: v, `[..., m]`.
    duals: f and g of the plan, in units of logits.
  """

  kernel: Float[Array, "*batch n m"]
  rows: Float[Array, "*batch n"]
  columns: Float[Array, "*batch m"]
  duals: Duals

  def dense(self) -> Float[Array, "*batch n m"]:
    """The attention weights, as those of `asap_jax.c_transform.plan`."""
    return self.rows[..., :, None] * self.kernel * self.columns[..., None, :]

  def apply(
    self,
    value: Float[Array, "*#batch m features"],
    key_weights: Weights = None,
    *,
    precision: jax.lax.PrecisionLike = None,
  ) -> Float[Array, "*batch n features"]:
    """The plan times values, u (E (v value)), without forming the plan.

    Args:
      value: `[..., m, features]`; the product is taken in its dtype (in float32 for
        float16, whose range is too small for scalings).
      key_weights: those of the plan; values of absent keys may hold anything.
      precision: of the product.

    Returns:
      `[..., n, features]`, in the dtype of `value`.
    """
    dtype = jnp.float32 if value.dtype == jnp.float16 else value.dtype
    value_ = zero_invalid(value, key_weights, axis=-2)
    scaled = (self.columns[..., None] * value_).astype(dtype)
    out = jnp.einsum(
      "...nm,...mv->...nv",
      self.kernel.astype(dtype),
      scaled,
      precision=precision,
      preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
    return (self.rows[..., None] * out).astype(value.dtype)


def scaled_plan(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  count: int,
  query_weights: Weights = None,
  key_weights: Weights = None,
  *,
  relaxation: Float[Array, "..."] | None = None,
  again: Callable[[Array], Array] | None = None,
) -> ScaledPlan:
  """The plan of `asap_jax.c_transform.closures`, with as few exponentials as is safe.

  From f = 0 it is Sinkhorn cut to `count` iterations. Rows are exact. Works under jit,
  vmap and grad, whatever the logits. Derivatives are right to first order; for second
  ones of several closures take `closures`, for JAX drops custom rules inside a scan
  there.

  Args:
    logits: see `asap_jax.c_transform.closures`, as all arguments.
    f: likewise.
    count: likewise.
    query_weights: likewise.
    key_weights: likewise.
    relaxation: likewise.
    again: forms the logits anew where a half-iteration has to be done so, in order
      that the kernel can take their place in memory; given an array to wait for, lest
      XLA form them ahead.

  Returns:
    `ScaledPlan`, with the duals of the plan.

  Raises:
    ValueError: as in `closures`.
  """
  check_closures(count, relaxation)
  check_logits(logits, query_weights, key_weights)
  n, m = logits.shape[-2:]
  dtype = jnp.promote_types(jnp.promote_types(logits.dtype, f.dtype), jnp.float32)
  logits = logits.astype(dtype)
  if again is None:
    again = lambda _: logits  # noqa: E731
  f = jnp.broadcast_to(zero_invalid(f.astype(dtype), query_weights), logits.shape[:-1])
  marginals = (
    row_sums(query_weights, n).astype(dtype),
    column_sums(query_weights, key_weights, n, m).astype(dtype),
  )
  pairs = valid_pairs(query_weights, key_weights)
  logits_ = logits, again, pairs
  to_keys = _Half(*logits_, query_weights, key_weights, marginals[1], axis=-2)
  to_queries = _Half(*logits_, key_weights, query_weights, marginals[0], axis=-1)

  def step(carry, omega):
    kernel, queries, keys, start = carry
    dual = queries.dual
    if omega is not None:
      dual = start + omega[..., None] * (dual - start)
      # Too large a scaling is not used, but must not overflow for the gradient's sake.
      exponent = jnp.minimum(dual - queries.absorbed, _LOG_LARGEST + 1.0)
      scaling = zero_invalid(jnp.exp(exponent), query_weights)
      queries = _Side(scaling, dual, queries.absorbed)
    kernel, queries, keys = to_keys(kernel, queries, keys.absorbed)
    kernel, keys, queries = to_queries(kernel, keys, queries.absorbed)
    return (kernel, queries, keys, dual), None

  kernel, queries, keys = to_keys.start(f)
  # The next closure needs what is absorbed at the keys: nothing to be gained then.
  dual_of = functools.partial(to_keys.dual_of, f, keys.scaling) if count == 1 else None
  kernel, keys, queries = to_queries(kernel, keys, queries.absorbed, dual_of)
  carry = kernel, queries, keys, f
  if count > 1:
    if relaxation is not None:
      relaxation = jnp.moveaxis(relaxation.astype(dtype), -1, 0)
    carry, _ = jax.lax.scan(step, carry, relaxation, length=count - 1)
  kernel, queries, keys, _ = carry
  return ScaledPlan(
    kernel, queries.scaling, keys.scaling, Duals(queries.dual, keys.dual)
  )


class _Side(NamedTuple):
  """One side's scaling; its dual is what is absorbed plus the scaling's logarithm."""

  scaling: Array
  dual: Array
  absorbed: Array  # a constant to differentiation


class _Half(NamedTuple):
  """Half a closure: from the scaling of the side summed over to that of the other."""

  logits: Array
  again: Callable[[Array], Array]  # the logits once more
  pairs: Bool[Array, "..."] | None
  weights: Weights  # of the side summed over
  target_weights: Weights
  marginal: Array
  axis: int  # summed over

  def __call__(
    self,
    kernel: Array,
    side: _Side,
    opposite: Array,
    dual_of: Callable[[Array], Array] | None = None,
  ) -> tuple[Array, _Side, _Side]:
    """The kernel, the side it came from, and the other; `opposite` is absorbed there.

    Differentiation sees none of the absorbing, which changes no value. `dual_of` gives
    the side's dual, from the logits, without what only absorbing would need of it.
    """
    kernel, scaling, dual, absorbed, opposite = jax.lax.stop_gradient(
      (kernel, *side, opposite)
    )
    sums = _contract(kernel, scaling, self.axis)
    kept = self._in_range(sums, scaling)

    def absorb(carry):
      logits = jax.lax.stop_gradient(self.again(carry[-1])).astype(kernel.dtype)
      absorbed = dual if dual_of is None else dual_of(logits)
      return *self._absorb(logits, absorbed), absorbed, jnp.ones((), bool)

    # A loop of no or one turn copies no kernel, as a branch would; and under vmap a
    # branch would always be taken.
    kernel, sums, opposite, absorbed, _ = jax.lax.while_loop(
      lambda carry: ~carry[-1], absorb, (kernel, sums, opposite, absorbed, kept)
    )
    anew = zero_invalid(_one(side.dual), self.weights)
    side = _Side(jnp.where(kept, side.scaling, anew), side.dual, absorbed)
    return self._finish(kernel, sums, side, opposite)

  def start(self, dual: Array) -> tuple[Array, _Side, _Side]:
    """The same with `dual` absorbed at once: the sums lie between one and the size."""
    kernel, sums, opposite = self._absorb(self.logits, jax.lax.stop_gradient(dual))
    one = zero_invalid(_one(dual), self.weights)
    side = _Side(one, dual, jax.lax.stop_gradient(dual))
    return self._finish(kernel, sums, side, opposite)

  def _absorb(self, logits: Array, dual: Array) -> tuple[Array, Array, Array]:
    """Kernel, its sums and what the other side absorbed: minus the largest scores."""
    logits = jax.lax.stop_gradient(logits)
    scores = logits + jnp.expand_dims(dual, -3 - self.axis)
    if self.pairs is not None:
      scores = jnp.where(self.pairs, scores, _LOG_ZERO)
    largest = scores.max(self.axis, keepdims=True)
    if self.pairs is not None:
      largest = jnp.where(largest > _LOG_ZERO / 2, largest, 0.0)
    kernel = jnp.exp(scores - largest)
    return kernel, kernel.sum(self.axis), -largest.squeeze(self.axis)

  def _in_range(self, sums: Array, scaling: Array) -> Array:
    # What is lost is below the smallest number, or below its product with a scaling.
    lost = jnp.finfo(sums.dtype).tiny * self.logits.shape[self.axis]
    largest = scaling.max(-1, keepdims=True)
    least = lost / _LOST * jnp.maximum(largest, 1.0)
    inside = (sums >= least) & (largest <= _LARGEST)
    return (inside | (self.marginal == 0)).all()

  def _finish(
    self, kernel: Array, sums: Array, side: _Side, opposite: Array
  ) -> tuple[Array, _Side, _Side]:
    kernel, sums = _differentiable(self.logits, side.scaling, kernel, sums, self.axis)
    scaling = _ratio(self.marginal, jnp.where(sums == 0, 1.0, sums))
    return kernel, side, _Side(scaling, self._dual(scaling, opposite), opposite)

  def dual_of(self, start: Array, scaling: Array, logits: Array) -> Array:
    """The other side's dual after `start`, given its scaling.

    The largest scores are looked for anew: where the first search for them has one use
    only, XLA fuses it with the exponential on a CPU.
    """
    start, scaling = jax.lax.stop_gradient((start, scaling))
    return self._dual(scaling, self._absorb(logits, start)[2])

  def _dual(self, scaling: Array, absorbed: Array) -> Array:
    present = jnp.where(scaling == 0, 1.0, scaling)
    return zero_invalid(absorbed + jnp.log(present), self.target_weights)


def _contract(kernel: Array, scaling: Array, axis: int) -> Array:
  """Sums of the kernel times `scaling` along `axis`."""
  spec = "...nm,...n->...m" if axis == -2 else "...nm,...m->...n"
  return jnp.einsum(spec, kernel, scaling, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _differentiable(
  logits: Array, scaling: Array, kernel: Array, sums: Array, axis: int
) -> tuple[Array, Array]:
  """Kernel and sums, whose derivative follows from what they are, not how computed."""
  return kernel, sums


@_differentiable.defjvp
def _differentiable_jvp(axis, primals, tangents):
  kernel, sums = _differentiable(*primals, axis)
  scaling = primals[1]
  kernel_dot = kernel * tangents[0]
  sums_dot = _contract(kernel, tangents[1], axis) + _contract(kernel_dot, scaling, axis)
  return (kernel, sums), (kernel_dot, sums_dot)


@jax.custom_jvp
def _one(dual: Array) -> Array:
  """Scalings of a dual that is absorbed: one, with the gradient of the dual."""
  return jnp.ones_like(dual)


@_one.defjvp
def _one_jvp(primals, tangents):
  return _one(*primals), tangents[0]


@jax.custom_jvp
def _ratio(a: Array, b: Array) -> Array:
  """a / b, with a derivative that does not square a small b."""
  return a / b


@_ratio.defjvp
def _ratio_jvp(primals, tangents):
  ratio = _ratio(*primals)
  return ratio, (tangents[0] - ratio * tangents[1]) / primals[1]
