r"""Orthostochastic attention: squares of an orthogonal matrix.

If Q is orthogonal, $P_{ij} = Q_{ij}^2$ has rows and columns that sum to one, without an
iteration. Two ways from logits S to Q, both for as many queries as keys: the QR
decomposition (Born et al., 2025, "Quantum doubly stochastic transformers", arXiv
2504.16275, section 3.3, where it stands beside a quantum circuit), and Cayley's map of
the skew part of S, which needs no decomposition of an n x n matrix. Tokens that are
padding are left out: the i-th valid query and the i-th valid key are one token.

Both call LAPACK on a CPU. Calls that wait for each other, as those of layers do, are
safe; several side by side in one program may stand still for ever with jaxlib 0.10,
whose batched kernels wait for threads that wait themselves.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.numerics import exact_einsum
from asap_jax.peers.ordered import Ordered

_REFINEMENTS = 2


@attention_fn(takes_bias=False)
def qr_attention(inputs: Inputs) -> Array:
  """Squares of the orthogonal factor of the logits' QR decomposition, O(n^3).

  The product of queries and keys has the rank of a head at most, and the columns of
  its factor beyond would be whatever rounding makes them: the identity is added to the
  logits, so that the decomposition is unique (in general) and has a gradient. The plan
  depends on the order of the keys. Works under jit, vmap and grad.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, as many queries as keys;
      `bias` must be `None`. The mask is as in `asap_jax.sinkhorn_attention`, with as
      many valid queries as valid keys.

  Returns:
    As `asap_jax.sinkhorn_attention`; an element with more valid queries than keys, or
    fewer, is NaN.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if there are not as many queries
      as keys.

  Example:
    >>> import jax
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> qr_attention(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """
  ordered = Ordered(inputs, "qr")
  logits = exact_einsum("...nd,...md->...nm", ordered.query, ordered.key)
  # Padding has logits of zero, hence rows and columns of the identity.
  q, _ = jnp.linalg.qr(logits + jnp.eye(logits.shape[-1], dtype=logits.dtype))
  return inputs.attend(ordered.restored(q * q))


@attention_fn(takes_bias=False)
def cayley_attention(inputs: Inputs, *, alpha: float | Array = 1.0) -> Array:
  r"""Squares of Cayley's map of the skew part of the logits, O(n^2 d).

  $A = \alpha (S - S^T)$ is skew, so $Q = (I - A)(I + A)^{-1}$ is orthogonal. A has
  rank 2 d: with $U = [q, -k]$ and $V = [k, q]$,
  $Q = I - 2 \alpha U (I + \alpha V^T U)^{-1} V^T$ (Woodbury), a system of 2 d unknowns
  a head. Meant for self-attention, where queries and keys are of the same tokens:
  tokens in another order give the plan in that order. Where logits are small the plan
  is near the identity. Works under jit, vmap and grad, in `alpha` too.

  Args:
    inputs: as of `qr_attention`.
    alpha: factor of the skew part.

  Returns:
    As `qr_attention`.

  Raises:
    ValueError: as `qr_attention`.

  Example:
    >>> import jax
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> cayley_attention(tokens, 2.0 * tokens + 1.0, tokens).shape
    (2, 6, 4, 8)
  """
  ordered = Ordered(inputs, "cayley")
  query, key = ordered.query, ordered.key
  u, v = jnp.concatenate([query, -key], -1), jnp.concatenate([key, query], -1)
  q = 2.0 * _inverse(alpha * u, v) - jnp.eye(query.shape[-2], dtype=query.dtype)
  return inputs.attend(ordered.restored(q * q))


@jax.custom_jvp
def _inverse(
  u: Float[Array, "*batch n k"], v: Float[Array, "*batch n k"]
) -> Float[Array, "*batch n n"]:
  r"""Inverse M of I + u v^T, by a system of k unknowns.

  Its derivative, $-M (du\,v^T + u\,dv^T) M$, needs no system. Derived from the
  solution, it would have several that do not wait for each other (module docstring).
  """
  one, n = jnp.eye(u.shape[-1], dtype=u.dtype), u.shape[-2]
  factors = jax.scipy.linalg.lu_factor(one + exact_einsum("...nd,...ne->...de", v, u))
  one = jnp.eye(n, dtype=u.dtype)

  def solved(right: Array) -> Array:
    """(I + A)^-1 times a matrix."""
    small = exact_einsum("...nd,...nm->...dm", v, right)
    small = jax.scipy.linalg.lu_solve(factors, small)
    return right - exact_einsum("...nd,...dm->...nm", u, small)

  inverse = solved(jnp.broadcast_to(one, (*u.shape[:-1], n)))
  # The small system is worse conditioned than I + A: float32 needs what it left.
  for _ in range(_REFINEMENTS):
    product = exact_einsum("...nd,...nm->...dm", v, inverse)
    left = one - inverse - exact_einsum("...nd,...dm->...nm", u, product)
    inverse = inverse + solved(left)
  return inverse


@_inverse.defjvp
def _inverse_jvp(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
  (u, v), (du, dv) = primals, tangents
  inverse = _inverse(u, v)
  left = lambda x: exact_einsum("...nm,...md->...nd", inverse, x)  # noqa: E731
  right = lambda x: exact_einsum("...nd,...nm->...dm", x, inverse)  # noqa: E731
  product = "...nd,...dm->...nm"
  moved = exact_einsum(product, left(du), right(v))
  return inverse, -moved - exact_einsum(product, left(u), right(dv))
