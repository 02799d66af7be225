"""Oracles in NumPy float64, written from the formulas on the present points alone.

Absent points are cut out first and put back as zeros last, so that nothing here knows
of masks, of sentinels or of float32.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linprog
from scipy.special import logsumexp

# Weights of N queries and M keys: equal masses, masks, float weights. Small whole
# numbers make cumulative masses of the two sides coincide, in exact arithmetic.
N, M = 6, 9
QUERY_MASK = np.array([1, 0, 1, 1, 1, 0], bool)
KEY_MASK = np.array([1, 1, 0, 1, 1, 1, 0, 1, 0], bool)
QUERY_MASSES = np.array([1, 3, 2, 1, 4, 1], np.float32)
KEY_MASSES = np.array([2, 1, 1, 3, 1, 1, 1, 1, 1], np.float32)
WEIGHTS = {
  "equal": (None, None),
  "query mask": (QUERY_MASK, None),
  "key mask": (None, KEY_MASK),
  "masks": (QUERY_MASK, KEY_MASK),
  "masses": (QUERY_MASSES, KEY_MASSES),
  "masses with zeros": (QUERY_MASSES * QUERY_MASK, 0.3 * KEY_MASSES * KEY_MASK),
  "mask and masses": (QUERY_MASK, KEY_MASSES),
}


def on_device(weights):
  """A pair of weights as JAX arrays."""
  return jax.tree.map(jnp.asarray, tuple(weights))


def random_logits(seed=0, scale=2.0):
  """Logits and a query-side dual, float32."""
  rng = np.random.default_rng(seed)
  logits, f = scale * rng.normal(size=(N, M)), rng.normal(size=N)
  return jnp.asarray(logits, jnp.float32), jnp.asarray(f, jnp.float32)


# Closures whose factors differ: how many, and options of `asap_jax.closures`.
STEPS = {
  "momentum": (4, {"relaxation": [1.5, 0.7, 1.2], "momentum": [0.9, 0.3, -0.2]}),
  "half": (0, {"side": "key"}),
  "key": (1, {"side": "key"}),
  "key and momentum": (
    3,
    {"side": "key", "relaxation": [1.4, 0.8], "momentum": [0.0, 0.4]},
  ),
}


def steps_on_device(options):
  """Options of `STEPS` as JAX arrays."""
  return {
    name: given if name == "side" else jnp.asarray(given, jnp.float32)
    for name, given in options.items()
  }


def random_dual(options, seed=0):
  """A dual of the side that options of `STEPS` start at, float32."""
  size = M if options.get("side") == "key" else N
  return jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)


def presence(weights):
  """Pairs of present points, `[N, M]`."""
  a, b = (np.ones(s) if w is None else w for w, s in zip(weights, (N, M), strict=True))
  return np.outer(a > 0, b > 0)


def present(weights, size):
  """Indices of the points that carry mass."""
  return np.arange(size) if weights is None else np.flatnonzero(weights)


def masses(weights, size):
  """Masses that sum to one, exact: a list of fractions."""
  if weights is None:
    weights = np.ones(size)
  weights = [Fraction(float(w)) for w in weights]
  return [w / sum(weights) for w in weights]


def quantile_ends(y, masses_y, level):
  """Q_y(level-) and Q_y(level+): a jump where a cumulative mass equals the level."""
  order = np.argsort(y, kind="stable")
  order = [j for j in order if masses_y[j] > 0]
  cumulative = np.cumsum([masses_y[j] for j in order])
  below = next(j for j, u in zip(order, cumulative, strict=True) if u >= level)
  above = [j for j, u in zip(order, cumulative, strict=True) if u > level]
  return y[below], y[above[0]] if above else y[order[-1]]


def slopes(x, y, x_weights, y_weights):
  """Order of the present x, and both ends of Q_y after each of them but the last."""
  a, b = masses(x_weights, len(x)), masses(y_weights, len(y))
  order = [i for i in np.argsort(x, kind="stable") if a[i] > 0]
  levels = np.cumsum([a[i] for i in order])[:-1]
  ends = np.array([quantile_ends(y, b, u) for u in levels]).reshape(-1, 2)
  return order, ends


def transport(x, y, x_weights, y_weights):
  """Q_y half-way through the mass of each x."""
  a, b = masses(x_weights, len(x)), masses(y_weights, len(y))
  result, level = np.zeros(len(x)), Fraction(0)
  for i in np.argsort(x, kind="stable"):
    if a[i] > 0:
      result[i] = np.mean(quantile_ends(y, b, level + a[i] / 2))
      level += a[i]
  return result


def potentials(x, y, x_weights=None, y_weights=None, cost="product"):
  """phi and psi with the midpoint at every jump."""
  x, y = (np.asarray(points, np.float64) for points in (x, y))
  phi, psi = np.zeros(len(x)), np.zeros(len(y))
  order_x, ends = slopes(x, y, x_weights, y_weights)
  phi[order_x[1:]] = -np.cumsum(ends.mean(-1) * np.diff(x[order_x]))
  order_y, ends = slopes(y, x, y_weights, x_weights)
  psi[order_y[1:]] = -np.cumsum(ends.mean(-1) * np.diff(y[order_y]))
  psi[order_y] -= x[order_x[0]] * y[order_y[0]]
  if cost == "squared":
    phi[order_x] += x[order_x] ** 2 / 2
    psi[order_y] += y[order_y] ** 2 / 2
  return phi, psi


def cost_matrix(x, y, cost):
  x, y = np.asarray(x, np.float64)[:, None], np.asarray(y, np.float64)[None]
  return -x * y if cost == "product" else (x - y) ** 2 / 2


def transport_cost(costs, a, b):
  """Value of the transport linear program with masses a and b."""
  n, m = costs.shape
  rows = np.kron(np.eye(n), np.ones(m))
  columns = np.kron(np.ones(n), np.eye(m))
  result = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=[*a, *b])
  assert result.status == 0
  return result.fun


def plan_sums(query_weights, key_weights, n, m):
  """Row and column sums of the attention weights, on the present points."""
  rows, columns = present(query_weights, n), present(key_weights, m)
  a = np.array(masses(query_weights, n), np.float64)[rows]
  b = np.array(masses(key_weights, m), np.float64)[columns]
  return len(rows) * a, len(rows) * b


def closures(
  logits,
  dual,
  count,
  query_weights=None,
  key_weights=None,
  relaxation=None,
  momentum=None,
  side="query",
):
  """Duals after `count` Sinkhorn iterations from the dual of one side.

  Between them f moves by omega (closed - f) + c (f - the f before). From the key side
  half an iteration comes first, and may be all.
  """
  n, m = logits.shape
  rows, columns = present(query_weights, n), present(key_weights, m)
  row_sums, column_sums = plan_sums(query_weights, key_weights, n, m)
  S = np.asarray(logits, np.float64)[np.ix_(rows, columns)]

  def to_queries(g):
    return np.log(row_sums) - logsumexp(S + g, axis=1)

  start = np.asarray(dual, np.float64)[rows if side == "query" else columns]
  starts = [start if side == "query" else to_queries(start)]
  # Without an iteration f is what was given, and there is no g.
  g_present = start if side == "key" else np.zeros(len(columns))
  f_present = starts[0]
  for k in range(count):
    g_present = np.log(column_sums) - logsumexp(S + f_present[:, None], axis=0)
    f_present = to_queries(g_present)
    if k < count - 1:
      omega = 1.0 if relaxation is None else np.float64(relaxation[k])
      moved = (1 - omega) * starts[-1] + omega * f_present
      if momentum is not None and k > 0:
        moved = moved + np.float64(momentum[k]) * (starts[-1] - starts[-2])
      starts.append(moved)
      f_present = moved
  f, g = np.zeros(n), np.zeros(m)
  f[rows], g[columns] = f_present, g_present
  return f, g


def plan(logits, f, g, query_weights=None, key_weights=None):
  """Attention weights, zero at absent points."""
  n, m = logits.shape
  at = np.ix_(present(query_weights, n), present(key_weights, m))
  result = np.zeros((n, m))
  result[at] = np.exp((np.asarray(logits, np.float64) + f[:, None] + g)[at])
  return result


def gradient(function, point, step=1e-4):
  """Central differences of a scalar function of one array."""
  point = np.asarray(point, np.float64)
  result = np.zeros_like(point)
  for at in np.ndindex(point.shape):
    shift = np.zeros_like(point)
    shift[at] = step
    result[at] = (function(point + shift) - function(point - shift)) / (2 * step)
  return result
