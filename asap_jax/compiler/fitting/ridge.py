"""Ridge regression of the dual map, from statistics streamed over batches.

Statistics are sums, so any number of batches costs the memory of one, and the order or
size of batches does not matter. They are kept in float64 on the host: features may be
nearly collinear (potentials along neighbouring slices are), and float32 sums of squares
would lose the directions that tell them apart. These functions therefore work on
concrete arrays, not under jit, vmap or grad.
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike


class RidgeStatistics(NamedTuple):
  """Sums over all tokens seen so far, per head.

  Attributes:
    gram: $F^T F$ of features F, `[heads, features, features]`, float64.
    moment: $F^T t$ with the target t, `[heads, features]`.
    count: tokens, `[heads]`.
  """

  gram: np.ndarray
  moment: np.ndarray
  count: np.ndarray  # type: ignore[assignment]  # also a method of tuples


def empty_statistics(heads: int, features: int) -> RidgeStatistics:
  """Statistics of no tokens."""
  return RidgeStatistics(
    np.zeros((heads, features, features)),
    np.zeros((heads, features)),
    np.zeros(heads, np.int64),
  )


def add_batch(
  statistics: RidgeStatistics,
  features: ArrayLike,
  target: ArrayLike,
  mask: ArrayLike | None = None,
) -> RidgeStatistics:
  """Statistics with one more batch; the given ones stay as they are.

  Args:
    statistics: of the batches before.
    features: `[batch, heads, n, features]`, centred over the valid tokens of each
      sequence and zero at the others (`asap_jax.dual_map.features.dual_features`).
    target: duals to predict, `[batch, heads, n]`, centred and zero there, too.
    mask: valid tokens, `[batch, heads or 1, n]`; all by default.

  Raises:
    ValueError: if shapes do not fit, or features or target are not finite.
  """
  features, target = np.asarray(features), np.asarray(target)
  heads, size = statistics.moment.shape
  if features.ndim != 4 or (features.shape[1], features.shape[3]) != (heads, size):
    raise ValueError(
      f"features has shape {features.shape}: expected [batch, {heads}, n, {size}]"
    )
  if target.shape != features.shape[:-1]:
    raise ValueError(f"target has shape {target.shape}: expected {features.shape[:-1]}")
  for name, values in (("features", features), ("target", target)):
    if not np.isfinite(values).all():
      raise ValueError(
        f"{name}: {np.count_nonzero(~np.isfinite(values))} of {values.size} values are "
        "not finite; the teacher's activations overflow on this batch"
      )
  mask = True if mask is None else np.asarray(mask)
  count = np.broadcast_to(mask, target.shape).sum((0, 2))
  columns = features.astype(np.float64).transpose(1, 0, 2, 3).reshape(heads, -1, size)
  target = target.astype(np.float64).transpose(1, 0, 2).reshape(heads, -1, 1)
  transposed = columns.transpose(0, 2, 1)
  return RidgeStatistics(
    statistics.gram + transposed @ columns,
    statistics.moment + (transposed @ target)[..., 0],
    statistics.count + count,
  )


def solve_ridge(statistics: RidgeStatistics, ridge: float = 1e-6) -> np.ndarray:
  """Weights that minimise $mean (t - F w)^2 + ridge |D w|^2$, D the deviations of F.

  Args:
    statistics: of at least as many tokens per head as there are features.
    ridge: penalty relative to the variance of each feature, positive. It bounds the
      weights that nearly collinear features can take.

  Returns:
    `[heads, features]`, float32, for features as they were given.

  Raises:
    ValueError: if there are too few tokens or `ridge` is not positive.
  """
  size = statistics.moment.shape[1]
  if not ridge > 0:
    raise ValueError(f"ridge={ridge}: expected a positive number")
  if statistics.count.min() < size:
    raise ValueError(
      f"statistics hold {statistics.count.min()} tokens for {size} features: expected "
      f"at least {size}, and far more for a map that holds on new data; calibrate on "
      "more batches"
    )
  count = statistics.count[:, None].astype(np.float64)
  deviation = np.sqrt(np.einsum("hff->hf", statistics.gram) / count)
  # A feature that never varies gets no weight.
  safe = np.where(deviation > 0, deviation, 1.0)
  scale = safe[:, :, None] * safe[:, None, :] * count[..., None]
  correlation = statistics.gram / scale
  moment = statistics.moment / (safe * count)
  standard = np.linalg.solve(correlation + ridge * np.eye(size), moment[..., None])
  return (standard[..., 0] / safe).astype(np.float32)
