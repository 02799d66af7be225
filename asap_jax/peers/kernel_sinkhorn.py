"""Sinkhorn attention as others run it: on the plain kernel, or by half-steps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.c_transform.entropic import (
  Duals,
  c_transform,
  closures,
  column_sums,
  plan,
  row_sums,
)
from asap_jax.masses import valid_pairs
from asap_jax.numerics import exact_einsum
from asap_jax.teacher.starts import Start


@attention_fn(takes_segments=True)
def kernel_sinkhorn_attention(inputs: Inputs, *, iterations: int = 20) -> Array:
  r"""Sinkhorn's iterations on the kernel $K = \exp(S)$: OTT-JAX's `lse_mode=False`.

  Each is $v = c / K^T u$, $u = r / K v$ (Cuturi, 2013, "Sinkhorn Distances"), without
  safeguards in float32: entries more than about 87 below the largest logit of their
  head vanish, so sharp logits give wrong plans, and rows that vanish as a whole attend
  to nothing; `asap_jax.c_transform.scaling_domain` has the speed without the limit.
  Works under jit, vmap and grad, by differentiating the unrolled iterations.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    iterations: full iterations, started at u = 1.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`.
  """
  if iterations < 1:
    raise ValueError(f"iterations={iterations}: expected at least one full iteration")
  masks = inputs.query_mask, inputs.key_mask
  logits, pairs = inputs.logits, valid_pairs(*masks)
  if pairs is not None:
    logits = jnp.where(pairs, logits, -jnp.inf)
  # Scaling K by a constant scales u by its inverse; without it float32 would overflow.
  highest = jax.lax.stop_gradient(logits.max((-2, -1), keepdims=True))
  kernel = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0))
  n, m = kernel.shape[-2:]
  rows, columns = (
    jnp.broadcast_to(sums.astype(kernel.dtype), (*kernel.shape[:-2], size))
    for sums, size in ((row_sums(masks[0], n), n), (column_sums(*masks, n, m), m))
  )

  def step(u, _):
    v = _divide(columns, exact_einsum("...nm,...n->...m", kernel, u))
    return _divide(rows, exact_einsum("...nm,...m->...n", kernel, v)), v

  u, v = jax.lax.scan(step, jnp.ones_like(rows), length=iterations)
  return inputs.attend(u[..., None] * kernel * v[-1][..., None, :])


def _divide(marginal: Array, total: Array) -> Array:
  """Quotient; where nothing is left of the kernel, the marginal, as OTT has it."""
  return marginal / jnp.where(total > 0, total, 1.0)


@attention_fn(takes_segments=True)
def sinkformer_attention(
  inputs: Inputs, *, half_steps: int = 3, start: Start = "zero"
) -> Array:
  """Sinkhorn cut to a number of half-steps, as Sinkformers count them.

  The first half-step scales the rows, so that one is softmax attention, and they
  alternate (Sander et al., 2022, "Sinkformers", arXiv 2110.11773): an odd number ends
  on rows, which are then exact, an even one on columns. $2 T + 1$ half-steps are
  softmax and T full iterations started from its dual; `asap_jax.sinkhorn_attention`
  starts from zero. In the log domain; works under jit, vmap and grad.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; see there, and
      `asap_jax.sinkhorn_attention` for the mask.
    half_steps: row or column normalisations in all, at least one.
    start: key-side dual that the first one meets; see `asap_jax.sinkhorn_attention`.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, for an unknown `start`, and if
      `half_steps` is below one.
  """
  if half_steps < 1:
    raise ValueError(f"half_steps={half_steps}: expected at least one")
  logits, masks = inputs.logits, (inputs.query_mask, inputs.key_mask)
  g = inputs.starting_dual(start, "key")
  duals = Duals(c_transform(logits, g, *masks, to="query"), g)
  if half_steps > 2:
    duals = closures(logits, duals.f, (half_steps - 1) // 2, *masks)
  if half_steps % 2 == 0:
    duals = duals._replace(g=c_transform(logits, duals.f, *masks, to="key"))
  return inputs.attend(plan(logits, duals, *masks))
