r"""Refitting what follows an attention whose plans have moved.

The outputs o of softmax attention are predicted from those of the new attention, u,
by ridge regression towards the identity over valid tokens,
$W = (U^T U + \lambda I)^{-1} (U^T O + \lambda I)$, columns centred. The map is folded
into the projection that follows, so that nothing is added to the model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

# Ridge, relative to the mean square of the new outputs.
RIDGE = 1e-2


class Moments(NamedTuple):
  """Sums over valid tokens of the outputs of two attentions, heads side by side.

  Attributes:
    uu: products of the new outputs, `[features, features]`.
    uo: of the new ones with softmax's, likewise.
    oo: squares of softmax's, summed.
    u: the new outputs, `[features]`.
    o: softmax's, `[features]`.
    count: of tokens.
  """

  uu: Any
  uo: Any
  oo: Any
  u: Any
  o: Any
  count: Any


def moments_of(
  new: Float[Array, "batch n heads features"],
  softmax: Float[Array, "batch n heads features"],
  valid: Bool[Array, "batch n heads"],
) -> Moments:
  """Moments of one call; what stands at tokens that are not valid does not count."""

  def flat(values: Array) -> Array:
    kept = jnp.where(valid[..., None], values.astype(jnp.float32), 0.0)
    return kept.reshape(-1, kept.shape[-2] * kept.shape[-1])

  u, o = flat(new), flat(softmax)
  exact = jax.lax.Precision.HIGHEST
  return Moments(
    uu=jnp.matmul(u.T, u, precision=exact),
    uo=jnp.matmul(u.T, o, precision=exact),
    oo=(o**2).sum(),
    u=u.sum(0),
    o=o.sum(0),
    count=valid.any(-1).sum().astype(jnp.float32),
  )


def distance(moments: Moments, affine: tuple[np.ndarray, np.ndarray] | None) -> float:
  """Distance of the outputs relative to the norm of softmax's, after a map or none.

  Args:
    moments: of one layer.
    affine: W and the constant that is added; `None` for none.
  """
  m = moments
  if affine is None:
    affine = np.eye(len(m.u)), np.zeros_like(m.u)
  w, c = affine
  square = (
    np.trace(w.T @ m.uu @ w)
    - 2 * np.trace(w.T @ m.uo)
    + m.oo
    + 2 * c @ (w.T @ m.u - m.o)
    + m.count * (c @ c)
  )
  return float(np.sqrt(max(square, 0.0) / m.oo)) if m.oo > 0 else float("nan")


def affine_map(moments: Moments, *, has_bias: bool) -> tuple[np.ndarray, np.ndarray]:
  """W, `[features, features]`, and the constant that is added, zero without a bias."""
  m = moments
  count = max(float(m.count), 1.0)
  u, o = (m.u / count, m.o / count) if has_bias else (0 * m.u, 0 * m.o)
  uu, uo = m.uu - count * np.outer(u, u), m.uo - count * np.outer(u, o)
  ridge = RIDGE * np.trace(uu) / len(uu) * np.eye(len(uu))
  # Outputs that are all zero have nothing to be learned from.
  w = np.linalg.solve(uu + ridge, uo + ridge) if np.any(uu) else np.eye(len(uu))
  return w, o - u @ w


def fold(projection: nnx.LinearGeneral, w: np.ndarray, c: np.ndarray) -> None:
  """Lets a projection of `[heads, features]` do an affine map of its input first."""
  kernel = np.asarray(projection.kernel[...], np.float64)
  flat = kernel.reshape(*w.shape[:-1], kernel.shape[-1])
  dtype = projection.kernel[...].dtype
  projection.kernel[...] = jnp.asarray((w @ flat).reshape(kernel.shape), dtype)
  if projection.bias is not None:
    added = np.einsum("...i,...io->...o", c, flat)
    old = np.asarray(projection.bias[...], np.float64)
    projection.bias[...] = jnp.asarray(old + added, projection.bias[...].dtype)
