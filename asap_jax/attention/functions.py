"""Softmax, Sinkhorn and compiled attention.

Each is an `AttentionFn`: it takes queries, keys and values `[batch..., length, heads,
head_dim]` and drops in as `attention_fn` of `nnx.MultiHeadAttention` or
`linen.MultiHeadDotProductAttention`; further arguments are bound with
`functools.partial`. Logits and duals are float32 whatever the input's dtype, on every
device: unless `precision` says otherwise, products that make logits are not rounded to
what a GPU or a TPU multiplies fastest.
"""

import functools
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.implementations.choice import (
  Implementation,
  choose_for,
  gradient_for,
)
from asap_jax.attention.implementations.dispatch import ClosedPlan
from asap_jax.attention.implementations.softmax import SoftmaxPlan
from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.c_transform.entropic import check_closures, plan
from asap_jax.dual_map.predict import DualMap, Steps, predict_dual
from asap_jax.teacher.sinkhorn import sinkhorn_duals
from asap_jax.teacher.starts import Start, check_start

# Implementations of the exact iterations.
Teacher = Literal["ott", "xla", "chunked", "cudnn", "pallas"]


@attention_fn(any_mask=True, takes_masses=True)
def softmax_attention(inputs: Inputs) -> Array:
  """Plain softmax attention: rows sum to one, columns to anything.

  Keys count by their masses, where they have some; of queries only the absent differ.
  Works under jit, vmap and grad.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, any mask included.

  Returns:
    `[batch..., n, heads, features]`; rows that the mask leaves empty are zero.

  Raises:
    ValueError: if shapes do not fit, or an unsupported argument is given.

  Example:
    >>> import jax
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> softmax_attention(tokens, tokens, tokens, is_causal=True).shape
    (2, 6, 4, 8)
  """
  return inputs.attend(SoftmaxPlan(inputs))


@attention_fn(takes_segments=True, takes_masses=True)
def sinkhorn_attention(
  inputs: Inputs,
  *,
  iterations: int = 20,
  implementation: Teacher | None = None,
  start: Start = "zero",
  relaxation: float = 1.0,
  tolerance: float | None = None,
) -> Array:
  """Doubly stochastic attention by Sinkhorn's algorithm (Sander et al., 2022).

  Rows are exact after any number of iterations, columns sum to n_valid / m_valid at
  convergence. From the Gaussian start one to three iterations come as close to it as
  twenty from zero (docs/gaussian_start.md). Works under jit, vmap and grad (through the
  iterations and the start), in reverse mode only.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; the mask is the outer
      product of valid queries and valid keys. A start does not see a bias.
    iterations: full Sinkhorn iterations from the start, each g from f and then f from
      g. None, `iterations=0`, leaves half of one: softmax attention whose logits carry
      the start's g as a bias of the keys; rows are exact. It needs another start than
      `"zero"`, from which it would be plain softmax.
    implementation: `None` takes the fastest for device, dtype, shape and number of
      iterations. All are the same plan, with the exact gradient of what was run.
      `"xla"` forms n x m kernels, on a CPU in blocks that stay in its cache, and its
      gradient keeps the duals of the iterations and no matrix; `"chunked"` takes
      O(n + m) memory, with a gradient O(iterations (n + m)), and so does `"cudnn"`,
      faster forward. `"pallas"` does so by kernels for a TPU, which have not been timed
      on one; up to 1,024 tokens one kernel runs all iterations, and one goes back. On
      other devices they are interpreted, slowly. `"ott"` is OTT-JAX's algorithm in the
      log domain, several times slower: the reference. Where the weights are sown or
      dropped they are formed, whichever is named. Half an iteration is none of
      OTT-JAX's: there `"ott"` takes the best of the others.
    start: `"zero"` (with masses their logarithms), or a potential of Gaussians with the
      moments of queries and keys (`asap_jax.gaussian_potential`): `"gaussian"` is
      `"gaussian_low_rank"`, and there are `"gaussian_diagonal"` and `"gaussian_full"`.
    relaxation: omega of over-relaxation between iterations (`asap_jax.closures`), from
      1 to below 2; not with `"ott"`. About 1.5 gains from the third iteration on,
      more from zero than from a start that is near; with two it may lose.
    tolerance: where to stop before all iterations are done, each sequence and head by
      itself: at this error of the columns, the distance of their sums to what they are
      to be, summed, relative to the sum of those (the mean of
      `asap_jax.metrics.column_error`). An iteration more is begun to know it. `None`
      runs all of them. Not with `"ott"`, `"cudnn"`, `"pallas"` or a relaxation.

  Returns:
    `[batch..., n, heads, features]`, zero at invalid queries.

  Raises:
    ValueError: as `asap_jax.attention.AttentionFn`, for too few `iterations`, an
      unknown `start`, a `relaxation` or a `tolerance` out of range, or an
      `implementation` that is unknown or cannot serve.

  Example:
    >>> import functools, jax
    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...   num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...   attention_fn=functools.partial(
    ...     sinkhorn_attention, iterations=2, start="gaussian"))
    >>> layer(jax.random.normal(jax.random.key(0), (2, 6, 8))).shape
    (2, 6, 8)
  """
  check_implementation(implementation)
  check_iterations(iterations, start, relaxation, tolerance)
  if tolerance is not None and implementation in ("ott", "cudnn", "pallas"):
    raise ValueError(
      f"implementation={implementation!r} with tolerance={tolerance}: expected None, "
      "'xla' or 'chunked', which can stop early"
    )
  if implementation == "ott" and iterations > 0:
    return inputs.attend(_by_ott(inputs, iterations, start, relaxation))
  named = None if implementation == "ott" else implementation
  chosen = choose_for(inputs, named, iterations, stops=tolerance is not None)
  if iterations == 0:
    g = inputs.starting_dual(start, "key")
    steps = Steps(relaxation=None, momentum=None, side="key")
    return inputs.attend(ClosedPlan(inputs, g, 0, steps, chosen))
  steps = Steps(
    relaxation=constant_relaxation(relaxation, iterations), momentum=None, side="query"
  )
  gradient = gradient_for(inputs, named, chosen) if relaxation == 1.0 else None
  return inputs.attend(
    ClosedPlan(
      inputs, start, iterations, steps, chosen, gradient=gradient, tolerance=tolerance
    )
  )


def _by_ott(inputs: Inputs, iterations: int, start: Start, relaxation: float) -> Array:
  """The plan of OTT-JAX's iterations."""
  if relaxation != 1.0:
    raise ValueError(
      f"relaxation={relaxation} with implementation='ott': OTT-JAX's iterations are "
      "plain here; pass implementation=None"
    )
  f = inputs.starting_dual(start)
  duals = sinkhorn_duals(inputs.logits, iterations, *inputs.masks, init=f)
  return plan(inputs.logits, duals, *inputs.masks)


def constant_relaxation(relaxation: float, iterations: int) -> Array | None:
  """One omega between every two iterations; `None` where they are plain."""
  return None if relaxation == 1.0 else jnp.full((iterations - 1,), relaxation)


def check_implementation(implementation: str | None) -> None:
  """Raises ValueError unless `sinkhorn_attention` knows an implementation."""
  if implementation is not None and implementation not in get_args(Teacher):
    names = ", ".join(get_args(Teacher))
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of {names}"
    )


def check_iterations(
  iterations: int,
  start: str,
  relaxation: float = 1.0,
  tolerance: float | None = None,
) -> None:
  """Raises ValueError unless `sinkhorn_attention` can do with these options."""
  check_start(start)
  if iterations == 0 and start == "zero":
    raise ValueError(
      "iterations=0 from start='zero': that is softmax_attention; expected at least "
      "one iteration, or another start"
    )
  if iterations < 0:
    raise ValueError(f"iterations={iterations}: expected a number that is not negative")
  if not 1.0 <= relaxation < 2.0:
    raise ValueError(
      f"relaxation={relaxation}: expected a number from 1 to below 2, beyond which the "
      "iterations do not converge"
    )
  if tolerance is None:
    return
  # Of another type it may be an array, which has no value under jit.
  if type(tolerance) is not float or not tolerance > 0.0:
    raise ValueError(f"tolerance={tolerance!r}: expected None or a float above zero")
  if iterations == 0 or relaxation != 1.0:
    raise ValueError(
      f"tolerance={tolerance} with iterations={iterations}, relaxation={relaxation}: "
      "expected at least one iteration, and no relaxation"
    )


@attention_fn(takes_segments=True, takes_masses=True)
def asap_attention(
  inputs: Inputs,
  *,
  dual_map: DualMap,
  implementation: Implementation | None = None,
) -> Array:
  """Compiled doubly stochastic attention: a predicted dual and its closures.

  (Tran, Milkert and Hyde, 2026, arXiv 2605.12879.) Rows are exact, columns as good as
  the dual map. Works under jit, vmap and grad, in the leaves of `dual_map` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, `scale` and `epsilon`
      those of the teacher; the mask is the outer product of valid queries and valid
      keys. The closure sees a bias, the features of the dual map do not.
    dual_map: calibrated parameters, one set per head.
    implementation: of the closures and the product with the values, `"xla"`,
      `"chunked"`, `"cudnn"` or `"pallas"`; `None` takes the best for device, dtype and
      shape, but the last, which has not been timed. Where the weights are sown or
      dropped they are formed, whichever is named.

  Returns:
    `[batch..., n, heads, features]`, zero at invalid queries.

  Raises:
    ValueError: as `asap_jax.attention.AttentionFn`, and if `dual_map` does not fit the
      heads or has half a closure alone from the query side.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> dual_map = DualMap(jnp.ones((4, 1, 8)), jnp.zeros((4, 8)), features=("query",))
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> asap_attention(tokens, tokens, tokens, dual_map=dual_map).shape
    (2, 6, 4, 8)
  """
  check_heads(dual_map, inputs)
  check_closures(dual_map.closures, **dual_map.steps)
  chosen = choose_for(inputs, implementation, dual_map.closures)
  dual = inputs.by_segment(functools.partial(predict_dual, dual_map))
  closed = ClosedPlan(inputs, dual, dual_map.closures, dual_map.steps, chosen, dual_map)
  return inputs.attend(closed)


def check_heads(dual_map: DualMap, inputs: Inputs) -> None:
  """Raises ValueError unless a map was calibrated for heads like these."""
  heads, _, dim = dual_map.directions.shape
  if (heads, dim) != (inputs.query.shape[-3], inputs.query.shape[-1]):
    raise ValueError(
      f"dual_map was calibrated for {heads} heads of dimension {dim}: got "
      f"{inputs.query.shape[-3]} heads of dimension {inputs.query.shape[-1]}"
    )
