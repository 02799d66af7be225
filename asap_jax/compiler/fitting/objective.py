r"""The dual objective: what a dual map can maximise without a teacher.

With logits S, row sums r and column sums c of the plan (`asap_jax.c_transform`), the
entropic dual with the key side eliminated is concave in f:

  $$D(f) = \sum_i r_i f_i + \sum_j c_j g_j(f),$$

with g(f) the c-transform of f. Its gradient is the error of the row sums,
$r - A \mathbf{1}$ with $A = \exp(S + f + g(f))$, and its maximum is the value of the
primal, $\min \sum A (\log A - S)$, so that $\max D - D(f)$ is KL(converged plan || A).

A map that is fitted so is OA-OT ("Amortized Optimal Transport from Sliced Potentials",
2026, arXiv 2604.15114); without slices and with a network, it is our form of Meta OT
(Amos et al., 2022, "Meta Optimal Transport", arXiv 2206.05262). Here the objective is
that of the closures of f: what is fitted is what is used. It is the refinement of
`descent` with the exact column sums in place of the teacher's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import c_transform, column_sums, row_sums
from asap_jax.compiler.fitting.samples import Sample
from asap_jax.masses import Masses, zero_invalid
from asap_jax.numerics import float_dtype


def dual_objective(
  logits: Float[Array, "*batch n m"],
  f: Float[Array, "..."],
  query_weights: Masses = None,
  key_weights: Masses = None,
) -> Float[Array, "*batch"]:
  """D(f), the entropic dual with the key side eliminated (module docstring).

  Per problem it is in units of logits times the mass of the plan, the number of valid
  queries. Invariant to a constant in f. Works under jit, vmap and grad; what lies at
  absent points changes neither value nor gradient.

  Args:
    logits: S, `[..., n, m]`.
    f: query-side dual, `[..., n]`.
    query_weights: `None`, mask or masses `[..., n]`.
    key_weights: likewise, `[..., m]`.

  Returns:
    D of each problem, `[...]`.

  Raises:
    ValueError: if weights do not fit the logits.
  """
  n, m = logits.shape[-2:]
  weights = query_weights, key_weights
  f = zero_invalid(f.astype(float_dtype(f)), query_weights)
  g = c_transform(logits, f, *weights, to="key")
  rows, columns = row_sums(query_weights, n), column_sums(*weights, n, m)
  return jnp.sum(rows * f, axis=-1) + jnp.sum(columns * g, axis=-1)


@jax.jit
def objective_sample(activation: Activation) -> Sample:
  """A sample for `asap_jax.compiler.fitting.descent` whose loss is minus the dual
  objective per row.

  `asap_jax.compiler.fitting.descent.mean_kl` of it is -(sum_i f_i + sum_j c_j g_j) /
  rows, with f and g closed and c the exact column sums: no teacher is run.
  """
  batch, heads, n, _ = activation.query.shape
  m = activation.key.shape[-2]
  columns = column_sums(activation.query_mask, activation.key_mask, n, m)
  columns = zero_invalid(
    jnp.broadcast_to(columns, (batch, heads, m)), activation.key_mask
  )
  return Sample(
    dataclasses.replace(activation, is_product=None), columns, jnp.zeros(batch)
  )
