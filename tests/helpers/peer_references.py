"""The peers' papers in NumPy float64, with loops, on one head's present tokens."""

import functools
from fractions import Fraction

import numpy as np


def softmax(x):
  """Along the last axis."""
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def sinkhorn(logits, a, b, half_steps, first):
  """The plan with marginals a and b after alternate scalings, `first` to be scaled."""
  plan = np.exp(logits - logits.max())
  for step in range(half_steps):
    if (step % 2 == 0) == (first == "rows"):
      plan = plan * (a / plan.sum(1))[:, None]
    else:
      plan = plan * (b / plan.sum(0))
  return plan


def kernel_sinkhorn(logits, iterations):
  n, m = logits.shape
  a, b = np.ones(n), np.full(m, n / m)
  return sinkhorn(logits, a, b, 2 * iterations, first="columns")


def sinkformer(logits, half_steps):
  n, m = logits.shape
  return sinkhorn(logits, np.ones(n), np.full(m, n / m), half_steps, first="rows")


def low_rank(q, k, pivot, scale, iterations):
  """n Gamma_1 diag(1 / p) Gamma_2 of LOTFormer."""
  points, p = pivot[0], softmax(pivot[1])
  a, b = np.full(len(q), 1 / len(q)), np.full(len(k), 1 / len(k))
  first = sinkhorn(scale * q @ points.T, a, p, 2 * iterations, "columns")
  second = sinkhorn(scale * points @ k.T, p, b, 2 * iterations, "columns")
  return len(q) * first @ np.diag(1 / p) @ second


def squares(q):
  return q * q


def cayley(logits):
  """Squares of (I - A)(I + A)^-1 for the skew part A = S - S^T."""
  skew, one = logits - logits.T, np.eye(len(logits))
  return squares((one - skew) @ np.linalg.inv(one + skew))


def rotation(axis, angle):
  """exp(-i angle / 2 times the Pauli matrix of an axis)."""
  pauli = {"x": [[0, 1], [1, 0]], "y": [[0, -1j], [1j, 0]], "z": [[1, 0], [0, -1]]}
  turned = 1j * np.sin(angle / 2) * np.array(pauli[axis])
  return np.cos(angle / 2) * np.eye(2) - turned


def on_qubits(qubits, factors):
  """Kronecker product of matrices on some qubits, by number, and ones elsewhere."""
  each = [factors.get(qubit, np.eye(2)) for qubit in range(qubits)]
  return functools.reduce(np.kron, each)


def cnot_unit(angles, control, target, qubits):
  """A CNOT, then rotations about y and z on its control, y and x on its target."""
  cnot = on_qubits(qubits, {control: np.diag([1, 0])}) + on_qubits(
    qubits, {control: np.diag([0, 1]), target: np.array([[0, 1], [1, 0]])}
  )
  of_control = rotation("z", angles[1]) @ rotation("y", angles[0])
  of_target = rotation("x", angles[3]) @ rotation("y", angles[2])
  return on_qubits(qubits, {control: of_control, target: of_target}) @ cnot


def circuit(angles, qubits):
  """The unitary matrix of layers of blocks, of their angles [layers, blocks, 4]."""
  unitary = np.eye(2**qubits)
  for layer, blocks in enumerate(angles):
    for block, own in enumerate(blocks):
      control = (layer + 2 * block) % qubits
      unit = cnot_unit(own, control, (control + 1) % qubits, qubits)
      unitary = unit @ unitary
  return unitary


def qontot(logits, theta, layers, data, auxiliaries):
  """The plan of a circuit, closed among the tokens if there are fewer than 2^data."""
  n, size, qubits = len(logits), 2**data, data + auxiliaries
  blocks = qubits // 2
  entries = np.zeros((size, size))
  entries[:n, :n] = logits
  angles = np.zeros(layers * blocks * 4)
  for place in range(max(entries.size, angles.size)):
    entry = entries.flat[place % entries.size]
    angles[place % angles.size] += theta[place] * entry
  unitary = circuit(angles.reshape(layers, blocks, 4), qubits)
  s = 2**auxiliaries
  plan = np.zeros((size, size))
  for i, j in np.ndindex(plan.shape):
    part = unitary[i * s : (i + 1) * s, j * s : (j + 1) * s]
    plan[i, j] = np.sum(np.abs(part) ** 2) / s
  given, got = plan[:n, n:].sum(1), plan[n:, :n].sum(0)
  return plan[:n, :n] + (np.outer(given, got / given.sum()) if n < size else 0.0)


def soft_sort(x, t):
  places = np.sort(x)[::-1]  # descending, as in the paper
  return np.array([softmax(-((place - x) ** 2) / t) for place in places])


def hard_sort(x):
  # Ascending: the plan is the same, and equal points keep their order.
  return np.eye(len(x))[np.argsort(x, kind="stable")]


def esp(q, k, directions, t, tau, hard=False):
  """ESPFormer's algorithm 1, times n."""
  n = len(q)
  costs = np.array([[np.sum((qi - kj) ** 2) for kj in k] for qi in q])
  plans, distances = [], []
  for theta in directions:
    theta = theta / np.linalg.norm(theta)
    sort = hard_sort if hard else lambda x: soft_sort(x, t)
    plan = sort(q @ theta).T @ sort(k @ theta) / n
    plans.append(plan)
    distances.append((costs * plan).sum())
  weights = softmax(-tau * np.array(distances))
  return n * sum(w * plan for w, plan in zip(weights, plans, strict=True))


def north_west(x, y):
  """The monotone coupling of equal masses, rows summing to one: exact fractions."""
  n, m = len(x), len(y)
  rows, columns = np.argsort(x, kind="stable"), np.argsort(y, kind="stable")
  plan = np.zeros((n, m))
  i = j = 0
  left, right = Fraction(1), Fraction(n, m)
  while i < n and j < m:
    moved = min(left, right)
    plan[rows[i], columns[j]] += float(moved)
    left, right = left - moved, right - moved
    if left == 0:
      i, left = i + 1, Fraction(1)
    if right == 0:
      j, right = j + 1, Fraction(n, m)
  return plan


def sliced(q, k, logits, directions, t):
  """Couplings along slices, averaged with weights exp(-t cost); t = inf is the best."""
  plans = [north_west(q @ theta, k @ theta) for theta in directions]
  costs = np.array([-(plan * logits).sum() / len(q) for plan in plans])
  if np.isinf(t):
    return plans[int(np.argmin(costs))]
  weights = softmax(-t * costs)
  return sum(w * plan for w, plan in zip(weights, plans, strict=True))


def differential(q, k, parameters, initial, scale, bias, allowed):
  """Difference of the two maps; pairs not allowed have logits of minus infinity."""
  a1, b1, a2, b2, _ = parameters
  lam = np.exp(a1 @ b1) - np.exp(a2 @ b2) + initial
  half = q.shape[-1] // 2
  maps = []
  for part in (slice(None, half), slice(half, None)):
    logits = scale * q[:, part] @ k[:, part].T + bias
    maps.append(softmax(np.where(allowed, logits, -np.inf)))
  return maps[0] - lam * maps[1]


def rms_norm(out, gain, initial):
  return (1 - initial) * out / np.sqrt(np.mean(out**2, -1, keepdims=True) + 1e-5) * gain
