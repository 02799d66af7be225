r"""Closures relative to a teacher's plan: what fitting evaluates a few hundred times.

With the teacher's plan $A_T = \exp(S + f_T + g_T)$ as the kernel, a closure of
$f = f_T + \varphi$ is two products of a matrix and a vector,

$$\gamma_j = \log c_j - \log \sum_i A_{T,ij} e^{\varphi_i}, \qquad
\varphi_i = \log r_i - \log \sum_j A_{T,ij} e^{\gamma_j},$$

and the plan of the closed duals is $A_{T,ij} e^{\varphi_i + \gamma_j}$. So nothing
depends on the logits any more, no exponential of a pair is taken, and near the teacher,
where a fit ends, everything is near one, however sharp the plan is. The divergence is

$$KL(A_T \| A) = -\sum_i r_i \varphi_i - \sum_j c^T_j \gamma_j$$

with the teacher's own column sums $c^T$, since its rows are exact. What is measured and
reported afterwards is the operator itself, on the logits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Activation
from asap_jax.c_transform.entropic import (
  advance,
  column_sums,
  plan,
  row_sums,
)
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.masses import centre, log_masses
from asap_jax.numerics import exact_einsum

# Of a relative dual: exponentials of more leave the range of float32. The excess over
# somewhat less counts as divergence, or a fit would hide in the bound.
_LARGEST, _RANGE = 80.0, 75.0
_LEAST = 1e-36  # of a sum over present points


class Relative(NamedTuple):
  """Sequences of one length, in the coordinates of their teacher's plan.

  Heads come first, since each is fitted by itself: all functions below are of one head,
  without that axis.

  Attributes:
    plan: of the teacher, `[heads, batch, n, m]`.
    duals: f and g of it, `[heads, batch, n]` and `[..., m]`, without the logarithms of
      masses, as features give them.
    rows: exact row sums, `[heads, batch, n]`, zero at absent queries.
    columns: exact column sums, `[heads, batch, m]`.
  """

  plan: Float[Array, "*heads batch n m"]
  duals: tuple[Array, Array]
  rows: Float[Array, "*heads batch n"]
  columns: Float[Array, "*heads batch m"]


@jax.jit
def relative_of(activation: Activation, teacher: Sinkhorn) -> Relative:
  """Calls of a layer in the coordinates of its teacher's plans."""
  logits, masks = activation.logits, activation.masks
  duals, _ = teacher.duals(activation)
  *_, n, m = logits.shape
  rows, columns = row_sums(masks[0], n), column_sums(*masks, n, m)
  pairs = jnp.ones(logits.shape[:-2])[..., None]
  f, g = (dual - log_masses(mask) for dual, mask in zip(duals, masks, strict=True))
  weights = plan(logits, duals, *masks)
  by_batch = Relative(weights, (f, g), rows * pairs, columns * pairs)
  return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_batch)


class Factors(NamedTuple):
  """Over-relaxation and momentum between closures, of which some may be in use."""

  relaxation: Float[Array, "*heads most"]
  momentum: Float[Array, "*heads most"]


class Closed(NamedTuple):
  """Duals of a closed plan, relative to the teacher's, and what left their range.

  Attributes:
    phi: `[batch, n]`.
    gamma: `[batch, m]`.
    excess: by how much starts of closures exceed the range, summed over points.
  """

  phi: Array
  gamma: Array
  excess: Array


def half_closed(problem: Relative, dual: Float[Array, "batch m"]) -> Closed:
  """Relative duals of half a closure of an absolute key-side dual."""
  gamma, excess = _bounded(centre(dual - problem.duals[1], problem.columns > 0))
  return Closed(_to_queries(problem, gamma), gamma, excess)


def closed(
  problem: Relative,
  dual: Float[Array, "batch n"],
  count: int | Array,
  factors: Factors,
) -> Closed:
  """Relative duals after closures of an absolute query-side dual (`asap_jax.closures`).

  Their number may be traced, such that one compiled function serves all of them.

  Args:
    problem: sequences.
    dual: with any constant, which the next closure cancels.
    count: closures, at least one.
    factors: between them; those beyond are not used.
  """
  phi, excess = _bounded(centre(dual - problem.duals[0], problem.rows > 0))
  phi, later = _iterated(problem, phi, factors, count - 1)
  gamma = _to_keys(problem, phi)
  return Closed(_to_queries(problem, gamma), gamma, excess + later)


def _step(problem, before, phi, factors):
  """One closure and what follows it, with the excess of the result."""
  fitted = _to_queries(problem, _to_keys(problem, phi))
  return _bounded(advance(before, phi, fitted, *factors))


@jax.custom_vjp
def _iterated(problem, phi, factors, count):
  return _forward(problem, phi, factors, count)[0]


def _forward(problem, phi, factors, count):
  most = factors.relaxation.shape[-1]
  history = jnp.zeros((most + 2, *phi.shape), phi.dtype).at[:2].set(phi)

  def step(k, carry):
    history, excess = carry
    own = jax.tree.map(lambda x: x[k], factors)
    phi, more = _step(problem, history[k], history[k + 1], own)
    return history.at[k + 2].set(phi), excess + more

  start = history, jnp.zeros(())
  history, excess = jax.lax.fori_loop(0, count, step, start)
  return (history[count + 1], excess), (problem, history, factors, count)


def _backward(kept, cotangents):
  problem, history, factors, count = kept
  of_phi, of_excess = cotangents

  def step(done, carry):
    of_before, of_phi, of_factors = carry
    k = count - 1 - done
    own = jax.tree.map(lambda x: x[k], factors)
    _, pull = jax.vjp(lambda *x: _step(problem, *x), history[k], history[k + 1], own)
    earlier, start, of_own = pull((of_phi, of_excess))
    of_factors = jax.tree.map(lambda x, y: x.at[k].set(y), of_factors, of_own)
    return earlier, of_before + start, of_factors

  zeros = jnp.zeros_like(of_phi), of_phi, jax.tree.map(jnp.zeros_like, factors)
  of_before, of_phi, of_factors = jax.lax.fori_loop(0, count, step, zeros)
  # The first step's two starts are the same.
  return jax.tree.map(jnp.zeros_like, problem), of_before + of_phi, of_factors, None


_iterated.defvjp(_forward, _backward)


def divergence(problem: Relative, found: Closed) -> Float[Array, ""]:
  """KL(teacher || closed plan) and the excess, summed over rows."""
  achieved = problem.plan.sum(-2)
  gained = jnp.vdot(problem.rows, found.phi) + jnp.vdot(achieved, found.gamma)
  return found.excess - gained


def total_variation(problem: Relative, found: Closed) -> Float[Array, ""]:
  """Total variation to the teacher's rows, summed over rows."""
  change = found.phi[..., None] + found.gamma[..., None, :]
  # An entry that is zero in the teacher's plan stays so.
  change = jnp.expm1(jnp.minimum(change, _LARGEST))
  return 0.5 * (problem.plan * jnp.abs(change)).sum()


def _to_keys(problem: Relative, phi: Array) -> Array:
  sums = exact_einsum("...nm,...n->...m", problem.plan, jnp.exp(phi))
  return _fitted(problem.columns, sums)


def _to_queries(problem: Relative, gamma: Array) -> Array:
  sums = exact_einsum("...nm,...m->...n", problem.plan, jnp.exp(gamma))
  return _fitted(problem.rows, sums)


def _fitted(marginal: Array, sums: Array) -> Array:
  """log(marginal / sums), zero at absent points; finite where float32 lost a sum."""
  present = marginal > 0
  target, sums = (jnp.where(present, x, 1.0) for x in (marginal, sums))
  return jnp.log(target) - jnp.log(jnp.maximum(sums, _LEAST))


def _bounded(phi: Array) -> tuple[Array, Array]:
  """A relative dual within the range of float32, and its excess."""
  excess = jnp.maximum(jnp.abs(phi) - _RANGE, 0.0).sum()
  return jnp.clip(phi, -_LARGEST, _LARGEST), excess
