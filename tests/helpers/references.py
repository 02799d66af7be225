"""Attention and the dual map in NumPy float64, one sequence and one head at a time."""

import numpy as np
from helpers import gaussian_references, oracles

FEATURES = ("potentials", "query", "cumulants")


def dual_features(
  query, key, directions, query_weights=None, key_weights=None, features=FEATURES
):
  """Columns of the feature kinds of one head, `[n, features]`."""
  query, key, directions = (
    np.asarray(array, np.float64) for array in (query, key, directions)
  )
  directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
  (mass, average_query, covariance_query), (_, average, covariance) = (
    gaussian_references.moments(points, weights)
    for points, weights in ((query, query_weights), (key, key_weights))
  )
  centred = query - average_query

  def potentials():
    return np.column_stack(
      [
        oracles.potentials(query @ theta, key @ theta, query_weights, key_weights)[0]
        for theta in directions
      ]
    )

  def cumulants():
    second = [q @ covariance @ q for q in query]
    return np.column_stack([query @ average, second])

  def gaussian_diagonal():
    x, y = np.diag(covariance_query), np.diag(covariance)
    return centred**2 * y / (0.5 + np.sqrt(x * y + 0.25))

  def gaussian():
    v = gaussian_references.low_rank(covariance_query, covariance, 4)
    return np.array([[x @ v @ x] for x in centred])

  kinds = {
    "potentials": potentials,
    "query": lambda: query,
    "cumulants": cumulants,
    "gaussian_diagonal": gaussian_diagonal,
    "gaussian": gaussian,
  }
  columns = np.column_stack([kinds[kind]() for kind in features])
  return (columns - mass @ columns) * (mass > 0)[:, None]


def predicted_dual(dual_map, head, query, key, query_weights=None, key_weights=None):
  """Dual of one head that a linear map predicts for its side, `[n]` or `[m]`."""
  tokens = query, key, dual_map.directions[head], query_weights, key_weights
  if dual_map.side == "key":
    tokens = key, query, dual_map.directions[head], key_weights, query_weights
  columns = dual_features(*tokens, dual_map.features)
  return columns @ np.asarray(dual_map.weights[head], np.float64)


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
  of the dual that the map predicts, with the map's factors between them.
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
    start, options = np.zeros(n), {}
    if dual_map is not None:
      start = predicted_dual(dual_map, h, q, k, *weights)
      options = of_head(h, dual_map.relaxation, dual_map.momentum)
      options["side"] = dual_map.side
    duals = oracles.closures(logits, start, iterations, *weights, **options)
    plans[b, h] = oracles.plan(logits, *duals, *weights)
    output[b, :, h] = plans[b, h] @ value[b, :, h]
  return output, plans


def of_head(head, relaxation, momentum):
  """A head's factors between closures, from `[heads, count - 1]` each."""
  factors = {"relaxation": relaxation, "momentum": momentum}
  return {k: x if x is None else np.float64(x[head]) for k, x in factors.items()}


def closed_values(
  query,
  key,
  value,
  dual,
  count,
  query_mask=None,
  key_mask=None,
  *,
  bias=None,
  relaxation=None,
  momentum=None,
  side="query",
):
  """Values under the plan of `count` closures, `[batch, heads, n, features]`.

  Weights are `[batch, 1, n]` and `[batch, 1, m]`, relaxation and momentum `[heads,
  count - 1]`.
  """
  arrays = query, key, value, dual
  query, key, value, dual = (np.asarray(x, np.float64) for x in arrays)
  output = np.zeros((*query.shape[:-1], value.shape[-1]))
  for b, h in np.ndindex(query.shape[:2]):
    logits = query[b, h] @ key[b, h].T
    logits = logits if bias is None else logits + np.asarray(bias[b, h])
    masks = [m if m is None else np.asarray(m)[b, 0] for m in (query_mask, key_mask)]
    options = {**of_head(h, relaxation, momentum), "side": side}
    duals = oracles.closures(logits, dual[b, h], count, *masks, **options)
    present = value[b, h]
    if masks[1] is not None:
      present = present * (masks[1] > 0)[:, None]
    output[b, h] = oracles.plan(logits, *duals, *masks) @ present
  return output
