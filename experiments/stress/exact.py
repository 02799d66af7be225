"""Attention in float64, by NumPy: plans from logits, masks and a start."""

import numpy as np


def log_sum(x: np.ndarray, axis: int) -> np.ndarray:
  """log sum exp, -inf where nothing is."""
  most = x.max(axis, keepdims=True, initial=-np.inf)
  most = np.where(np.isfinite(most), most, 0.0)
  with np.errstate(divide="ignore"):
    return most + np.log(np.exp(x - most).sum(axis, keepdims=True))


def softmax_plan(logits: np.ndarray) -> np.ndarray:
  """Rows that sum to one; zero where no key is allowed (logits of -inf)."""
  total = log_sum(logits, -1)
  return np.where(np.isfinite(total), np.exp(logits - _finite(total)), 0.0)


def sinkhorn_plan(
  logits: np.ndarray, allowed: np.ndarray, f: np.ndarray, iterations: int
) -> np.ndarray:
  """The plan after so many iterations from the query-side dual `f`.

  Each makes the columns sum to what they are to, and then the rows to one. Within a
  block of `allowed`, which are its segments, columns sum to queries / keys.
  """
  f = f[..., None]
  column = _column_sums(allowed)
  for _ in range(iterations):
    g = np.where(column > 0, np.log(np.maximum(column, 1e-300)), 0.0)
    g = g - _finite(log_sum(logits + f, -2))
    f = -_finite(log_sum(logits + g, -1))
  return np.where(allowed, np.exp(logits + f + g), 0.0)


def half_plan(logits: np.ndarray, g: np.ndarray) -> np.ndarray:
  """The plan of half an iteration from the key-side dual `g`."""
  return softmax_plan(logits + g[..., None, :])


def _column_sums(allowed: np.ndarray) -> np.ndarray:
  """What columns sum to, `[..., 1, m]`: queries over keys of their block."""
  queries = allowed.sum(-2, keepdims=True)
  keys = (allowed * allowed.sum(-1, keepdims=True)).max(-2, keepdims=True, initial=0)
  return queries / np.maximum(keys, 1)


def _finite(x: np.ndarray) -> np.ndarray:
  return np.where(np.isfinite(x), x, 0.0)
