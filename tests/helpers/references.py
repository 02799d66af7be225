"""Attention and the dual map in NumPy float64, one sequence and one head at a time."""

import numpy as np
from helpers import oracles


def dual_features(query, key, directions, query_weights=None, key_weights=None):
  """Columns potentials, query, cumulants of one head, `[n, features]`."""
  query, key, directions = (
    np.asarray(array, np.float64) for array in (query, key, directions)
  )
  directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
  a, b = (
    np.array(oracles.masses(weights, len(points)), np.float64)
    for weights, points in ((query_weights, query), (key_weights, key))
  )
  potentials = [
    oracles.potentials(query @ theta, key @ theta, query_weights, key_weights)[0]
    for theta in directions
  ]
  average = b @ key
  covariance = sum(
    mass * np.outer(k - average, k - average) for mass, k in zip(b, key, strict=True)
  )
  columns = np.column_stack(
    [
      *potentials,
      query,
      query @ average,
      [q @ covariance @ q for q in query],
    ]
  )
  return (columns - a @ columns) * (a > 0)[:, None]


def attention(
  query,
  key,
  value,
  iterations,
  *,
  query_mask=None,
  key_mask=None,
  bias=None,
  scale=None,
  epsilon=1.0,
  dual_map=None,
):
  """Outputs `[batch, n, heads, features]` and plans `[batch, heads, n, m]`.

  Masks are `[batch, n]` and `[batch, m]`. With a dual map it is `iterations` closures
  of the dual that the map predicts.
  """
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  batch, n, heads, dim = query.shape
  scale = dim**-0.5 if scale is None else scale
  output = np.zeros((batch, n, heads, value.shape[-1]))
  plans = np.zeros((batch, heads, n, key.shape[1]))
  for b, h in np.ndindex(batch, heads):
    q, k = query[b, :, h] * scale / epsilon, key[b, :, h]
    weights = [mask if mask is None else mask[b] for mask in (query_mask, key_mask)]
    logits = q @ k.T + (0 if bias is None else bias[b, h])
    start = np.zeros(n)
    if dual_map is not None:
      columns = dual_features(q, k, dual_map.directions[h], *weights)
      start = columns @ np.asarray(dual_map.weights[h], np.float64)
    duals = oracles.closures(logits, start, iterations, *weights)
    plans[b, h] = oracles.plan(logits, *duals, *weights)
    output[b, :, h] = plans[b, h] @ value[b, :, h]
  return output, plans


def closed_values(
  query,
  key,
  value,
  f,
  count,
  query_mask=None,
  key_mask=None,
  *,
  bias=None,
  relaxation=None,
):
  """Values under the plan of `count` closures from f, `[batch, heads, n, features]`.

  Weights are `[batch, 1, n]` and `[batch, 1, m]`, the relaxation `[heads, count - 1]`.
  """
  query, key, value, f = (np.asarray(x, np.float64) for x in (query, key, value, f))
  output = np.zeros((*query.shape[:-1], value.shape[-1]))
  for b, h in np.ndindex(query.shape[:2]):
    logits = query[b, h] @ key[b, h].T
    logits = logits if bias is None else logits + np.asarray(bias[b, h])
    masks = [m if m is None else np.asarray(m)[b, 0] for m in (query_mask, key_mask)]
    omega = None if relaxation is None else np.float64(relaxation[h])
    duals = oracles.closures(logits, f[b, h], count, *masks, omega)
    present = value[b, h]
    if masks[1] is not None:
      present = present * (masks[1] > 0)[:, None]
    output[b, h] = oracles.plan(logits, *duals, *masks) @ present
  return output
