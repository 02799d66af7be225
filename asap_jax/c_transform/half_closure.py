"""Half a closure in the scaling domain, kept in the range of float32.

See `asap_jax.c_transform.scaling_domain` for the form of the plan, and for what is
absorbed into its kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.c_transform.entropic import LOG_ZERO, column_sums, row_sums
from asap_jax.masses import Masses, Side, zero_invalid
from asap_jax.numerics import exact_einsum, float_dtype
from asap_jax.sizes import Size

T = TypeVar("T")  # a pytree of arrays

# Entries of the kernel below the smallest normal number are lost; together they may be
# this share of a sum.
_LOST = 1e-7
# Of rows and of columns, broadcast to pairs.
_AXES = (..., slice(None), None), (..., None, slice(None))
# Bounds scalings from above; their products with sums stay below the largest float32.
_LARGEST = 1e30
_LOG_LARGEST = 69.08


class ScaledSide(NamedTuple):
  """One side of a plan in factors.

  Attributes:
    scaling: of the kernel's rows or columns.
    dual: in units of logits.
    absorbed: the part of the dual that is in the kernel.
    marginal: what the plan is to sum to.
    in_range: whether all sums so far were, where nothing looks after that.
  """

  scaling: Array
  dual: Array
  absorbed: Array
  marginal: Array
  in_range: Array

  def moved_to(self, dual: Array) -> "ScaledSide":
    """The same with another dual, in the kernel as it is."""
    # Too large a scaling is absorbed, and must only not overflow before.
    exponent = jnp.minimum(dual - self.absorbed, _LOG_LARGEST + 1.0)
    scaling = jnp.where(self.marginal > 0, jnp.exp(exponent), 0.0)
    return self._replace(scaling=scaling, dual=dual)


class Begun(NamedTuple):
  """A closure after its first half.

  Attributes:
    kernel: E, `[..., n, m]`, all of the given dual absorbed.
    queries: their side.
    keys: likewise.
  """

  kernel: Array
  queries: ScaledSide
  keys: ScaledSide


# Of kernel, the side that is given and the one that is fitted to it, and the axis of
# the former; returns the same three.
Half = Callable[..., tuple[Array, ScaledSide, ScaledSide]]


def begin(
  logits: Array,
  dual: Array,
  query_weights: Masses,
  key_weights: Masses,
  side: Side = "query",
  *,
  guarded: bool,
) -> tuple[Begun, Half]:
  """The first half of a closure of `dual`, that of `side`; and what does all others.

  Args:
    logits: S, `[..., n, m]`, finite.
    dual: to start at, broadcast to `[..., n]` or `[..., m]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: the same of the keys, `[..., m]`.
    side: whose dual it is.
    guarded: whether sums are kept in range; else `in_range` tells whether they were.
  """
  n, m = logits.shape[-2:]
  dtype = float_dtype(logits, dual)
  logits = logits.astype(dtype)
  weights = query_weights, key_weights
  sums = (
    row_sums(query_weights, n).astype(dtype),
    column_sums(query_weights, key_weights, n, m).astype(dtype),
  )
  # Sums instead of selects, with which XLA would make slower loops.
  absent = [
    LOG_ZERO * (own <= 0)[at]
    for own, given, at in zip(sums, weights, _AXES, strict=True)
    if given is not None
  ]
  # It needs no product: all of the dual is in the kernel.
  own, other, axis = (0, 1, -2) if side == "query" else (1, 0, -1)
  dual = jnp.broadcast_to(
    zero_invalid(dual.astype(dtype), weights[own]),
    (*logits.shape[:-2], logits.shape[axis]),
  )
  kernel, totals, absorbed = _absorb(logits, dual, absent, axis)
  one = jnp.broadcast_to((sums[own] > 0).astype(dtype), dual.shape)
  given = ScaledSide(one, dual, dual, sums[own], jnp.ones((), bool))
  fitted = _fitted(totals, absorbed, sums[other])
  both = (given, fitted) if side == "query" else (fitted, given)
  return Begun(kernel, *both), functools.partial(_half, logits, absent, guarded)


def fast_first(run: Callable[..., tuple[T, Array]], *arguments: Any) -> T:
  """The first of what `run(guarded, *arguments)` gives, however the sums turn out.

  A guard that looks at every sum waits for it, which costs nothing on a CPU; elsewhere
  the host may have to ask the device each time. There all is run without it, and once
  more with it where a sum left its range: one look.

  Args:
    run: returns a result, and whether all sums were in range; guarded they are.
    *arguments: pytrees of arrays.
  """

  def look_once(*arguments):
    return jax.lax.while_loop(
      lambda found: ~found[1],
      lambda _: run(True, *arguments),
      run(False, *arguments),
    )[0]

  return jax.lax.platform_dependent(
    *arguments, cpu=lambda *given: run(True, *given)[0], default=look_once
  )


def _half(logits, absent, guarded, kernel, here, there, *, axis):
  """Half a closure: fits the scaling of `there` to sums over `axis`, those of `here`.

  Returns the kernel and both sides; the kernel and `here` change where the sums leave
  their range.
  """
  sums = _contract(kernel, here.scaling, axis)
  kept = sums_in_range(sums, here.scaling, there.marginal, kernel.shape[axis])
  if not guarded:
    fitted = _fitted(sums, there.absorbed, there.marginal)
    kept = kept & here.in_range & there.in_range
    return kernel, here, fitted._replace(in_range=kept)

  def absorb(_):
    # All of the dual goes into the kernel, so that the scaling is one.
    kernel, sums, absorbed = _absorb(logits, here.dual, absent, axis)
    one = jnp.where(here.marginal > 0, jnp.ones_like(here.dual), 0.0)
    return kernel, sums, one, here.dual, absorbed, jnp.ones((), bool)

  # A loop of no or one turn copies no kernel, as a branch would; and under vmap a
  # branch would always be taken.
  kernel, sums, scaling, own, opposite, _ = jax.lax.while_loop(
    lambda carry: ~carry[-1],
    absorb,
    (kernel, sums, here.scaling, here.absorbed, there.absorbed, kept),
  )
  here = here._replace(scaling=scaling, absorbed=own)
  return kernel, here, _fitted(sums, opposite, there.marginal)


def _fitted(sums: Array, absorbed: Array, marginal: Array) -> ScaledSide:
  """A side whose scaling gives the plan its marginal there."""
  scaling = marginal / jnp.where(sums == 0, 1.0, sums)
  dual = absorbed + jnp.log(jnp.where(scaling == 0, 1.0, scaling))
  dual = jnp.where(marginal > 0, dual, 0.0)
  return ScaledSide(scaling, dual, absorbed, marginal, jnp.ones((), bool))


def _absorb(logits, dual, absent, axis):
  """Kernel, its sums and what the other side absorbs: minus the largest scores."""
  scores = logits + jnp.expand_dims(dual, -3 - axis)
  for each in absent:
    scores = scores + each
  largest = scores.max(axis, keepdims=True)
  if absent:
    largest = jnp.where(largest > LOG_ZERO / 2, largest, 0.0)
  kernel = jnp.exp(scores - largest)
  return kernel, kernel.sum(axis), -largest.squeeze(axis)


def sums_in_range(sums: Array, scaling: Array, marginal: Array, size: Size) -> Array:
  """Whether no sum over `size` points has lost anything that counts."""
  # What is lost is below the smallest number, or below its product with a scaling.
  lost = jnp.finfo(sums.dtype).tiny * size
  largest = scaling.max(-1, keepdims=True)
  least = lost / _LOST * jnp.maximum(largest, 1.0)
  inside = (sums >= least) & (largest <= _LARGEST)
  return (inside | (marginal == 0)).all()


def _contract(kernel: Array, scaling: Array, axis: int) -> Array:
  """Sums of the kernel times `scaling` along `axis`."""
  spec = "...nm,...n->...m" if axis == -2 else "...nm,...m->...n"
  return exact_einsum(spec, kernel, scaling)
