r"""Attention by a simulated quantum circuit: squared moduli of a unitary matrix.

Born et al., 2025, "Quantum doubly stochastic transformers", arXiv 2504.16275, whose
circuit is that of Mariella et al., 2024, "Quantum theory and application of contextual
optimal transport" (QontOT), arXiv 2402.14991. A circuit on q data qubits and r
auxiliary ones is a unitary U of size $2^q s$, $s = 2^r$, and
$P_{ij} = \frac{1}{s} \sum_{a, b} |U_{(i, a), (j, b)}|^2$ is doubly stochastic for any
angles of its gates: no iteration, no limit.

Theirs are P; layers of parametrised gates; angles that are $\theta$ times the logits,
entry by entry, with $\theta$ fixed (which did as well as a learned one) or learned; and
lengths that padding makes a power of two. They ran 16 layers and 4 auxiliary qubits on
matrices of 8 x 8. Ours, where we know of no fixed form, are these:

- A layer has a block on each of the pairs of neighbouring qubits (l, l + 1),
  (l + 2, l + 3), ..., on a ring, where l is its number: the pairs alternate. Data
  qubits come first.
- A block is the "CNOT unit" of Madden and Simonetto, 2021, "Best approximate quantum
  compiling problems", arXiv 2106.05649: a CNOT, then $R_z R_y$ on its control, the
  first qubit, and $R_x R_y$ on its target: four angles.
- Logits, row by row, go to the angles in their order, and from the start again if there
  are more angles; if there are fewer, an angle is the sum of all that come to it.
- The mass between tokens and padding goes back to the tokens, in proportion (`closed`).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.numerics import exact_einsum, with_usual_promotion
from asap_jax.peers.ordered import Ordered

# Of one head: a matrix of 4096 x 4096 complex numbers, 128 MiB.
MOST_QUBITS = 12
_ANGLES = 4  # of a block


@attention_fn(takes_bias=False)
def qontot_attention(
  inputs: Inputs,
  *,
  theta: float | Array = 1.0,
  layers: int = 16,
  auxiliaries: int = 1,
) -> Array:
  r"""Squared moduli of a circuit whose angles are the logits (module docstring).

  Simulated on this device: with D = 2^(q + r), D^2 complex numbers a head and
  O(layers (q + r) D^2) operations, and for a gradient D^2 numbers for each layer. Such
  a simulation is for short sequences and for comparison; a quantum device would need
  neither. Exactly doubly stochastic for any n, masked or not. The plan depends on the
  order of the tokens, and on the length of the array: tokens with padding behind them
  that makes q greater have another circuit, hence another plan, than by themselves.
  Works under jit, vmap and grad, in `theta` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`, as many queries as keys;
      `bias` must be `None`. The mask is as in `asap_jax.sinkhorn_attention`, with as
      many valid queries as valid keys.
    theta: factors of the logits, a number or `[heads or 1, theta_size(n, layers,
      auxiliaries)]`.
    layers: of the circuit.
    auxiliaries: r, auxiliary qubits.

  Returns:
    As `asap_jax.sinkhorn_attention`; an element with more valid queries than keys, or
    fewer, is NaN.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, if there are not as many queries as
      keys, if `theta` does not fit, if `layers` is below one or `auxiliaries` below
      zero, and if q + r is more than `MOST_QUBITS`.

  Example:
    >>> import jax
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> qontot_attention(tokens, tokens, tokens, layers=2).shape
    (2, 6, 4, 8)
  """
  ordered = Ordered(inputs, "qontot")
  logits = exact_einsum("...nd,...md->...nm", ordered.query, ordered.key)
  n = logits.shape[-1]
  size, data = theta_size(n, layers, auxiliaries), data_qubits(n, auxiliaries)
  if jnp.ndim(theta):
    heads, shape = logits.shape[-3], jnp.shape(theta)
    if shape not in ((heads, size), (1, size)):
      raise ValueError(f"theta has shape {shape}: expected [{heads} or 1, {size}]")
  # Padding has logits of zero.
  padding = [(0, 0)] * (logits.ndim - 2) + [(0, 2**data - n)] * 2
  entries = jnp.pad(logits, padding).reshape(*logits.shape[:-2], 4**data)
  entries = jnp.tile(entries, -(-size // 4**data))[..., :size]
  qubits = data + auxiliaries
  angles = folded(theta * entries, layers * (qubits // 2) * _ANGLES)
  blocks = angles.reshape(*angles.shape[:-1], layers, qubits // 2, _ANGLES)
  plan = doubly_stochastic(circuit(blocks, qubits), auxiliaries)
  valid = ordered.valid
  if valid is not None or n < 2**data:
    there = jnp.ones(n, bool) if valid is None else valid
    behind = [(0, 0)] * (there.ndim - 1) + [(0, 2**data - n)]
    plan = closed(plan, jnp.pad(there, behind))[..., :n, :n]
  return inputs.attend(ordered.restored(plan))


def data_qubits(n: int, auxiliaries: int) -> int:
  """Qubits q for n tokens: 2^q >= n, and two qubits at least with the auxiliary ones.

  Raises:
    ValueError: if the circuit is too large to be simulated, or `auxiliaries` negative.
  """
  if auxiliaries < 0:
    raise ValueError(f"auxiliaries={auxiliaries}: expected 0, 1, ...")
  data = max((n - 1).bit_length(), 2 - auxiliaries)
  if data + auxiliaries > MOST_QUBITS:
    raise ValueError(
      f"{n} tokens with auxiliaries={auxiliaries} are {data + auxiliaries} qubits, of "
      f"which a simulation holds a matrix of {2 ** (data + auxiliaries):,} rows a "
      f"head: expected at most {MOST_QUBITS} qubits"
    )
  return data


def theta_size(n: int, layers: int = 16, auxiliaries: int = 1) -> int:
  """Factors of one head: as many as padded logits or angles, whichever are more.

  >>> theta_size(6, layers=16, auxiliaries=1), theta_size(64, layers=16)
  (128, 4096)

  Args:
    n: tokens.
    layers: of the circuit.
    auxiliaries: auxiliary qubits.

  Raises:
    ValueError: see `qontot_attention`.
  """
  if layers < 1:
    raise ValueError(f"layers={layers}: expected at least one")
  data = data_qubits(n, auxiliaries)
  return max(4**data, layers * ((data + auxiliaries) // 2) * _ANGLES)


def folded(
  terms: Float[Array, "*batch terms"], count: int
) -> Float[Array, "*batch count"]:
  """Sums of the terms whose places are alike modulo `count`, not more than there are.

  >>> folded(jnp.arange(5.0), 2)
  Array([6., 4.], dtype=float32)
  """
  size = terms.shape[-1]
  times = -(-size // count)
  padding = [(0, 0)] * (terms.ndim - 1) + [(0, times * count - size)]
  return jnp.pad(terms, padding).reshape(*terms.shape[:-1], times, count).sum(-2)


def circuit(
  angles: Float[Array, "*batch layers blocks 4"], qubits: int
) -> Complex[Array, "*batch size size"]:
  """Unitary matrix of a circuit (module docstring), of size 2^qubits.

  Its indices are binary numbers, the first qubit's digit first.
  """
  gates = jnp.moveaxis(_gates(angles), -4, 0)
  dim, batch = 2**qubits, angles.shape[:-3]
  blocks = qubits // 2

  @jax.checkpoint  # one matrix for each layer, not for each block
  @with_usual_promotion
  def layer(state, gates):
    for block in range(blocks):
      # On the two qubits in front, which then go to the end.
      state = state.reshape(*batch, 4, dim // 4, dim)
      gate = gates[..., block, :, :]
      state = _product(gate, state).reshape(*batch, dim, dim)
    return _rotated(state, qubits - 2 * blocks + 1), None

  start = jnp.broadcast_to(jnp.eye(dim, dtype=gates.dtype), (*batch, dim, dim))
  state, _ = jax.lax.scan(layer, start, gates)
  return _rotated(state, -angles.shape[-3] % qubits)


def _product(gate: Array, state: Array) -> Array:
  """Sum over y of gate[x, y] state[y, rest, columns], as [rest, x, columns]."""
  return jnp.einsum(
    "...xy,...yrc->...rxc", gate, state, precision=jax.lax.Precision.HIGHEST
  )


def _rotated(state: Array, count: int) -> Array:
  """Rows whose `count` qubits in front go to the end."""
  *batch, dim, _ = state.shape
  front = 2**count
  state = state.reshape(*batch, front, dim // front, dim)
  return jnp.swapaxes(state, -3, -2).reshape(*batch, dim, dim)


def _gates(angles: Array) -> Array:
  """Matrices of blocks, `[..., 4, 4]`, of their angles, `[..., 4]`."""
  control_y, control_z, target_y, target_x = jnp.moveaxis(angles / 2.0, -1, 0)
  turn = functools.partial(jax.lax.complex, jnp.zeros_like(control_z))
  phases = jnp.exp(jnp.stack([turn(-control_z), turn(control_z)], -1))
  control = phases[..., :, None] * _rotation(control_y)
  cos, sin = jnp.cos(target_x), jnp.sin(target_x)
  cos, sin = jax.lax.complex(cos, jnp.zeros_like(cos)), turn(-sin)
  about_x = jnp.stack([jnp.stack([cos, sin], -1), jnp.stack([sin, cos], -1)], -2)
  target = jnp.einsum(
    "...xy,...yz->...xz",
    about_x,
    _rotation(target_y).astype(about_x.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  both = control[..., :, None, :, None] * target[..., None, :, None, :]
  both = both.reshape(*angles.shape[:-1], 4, 4)
  return both[..., jnp.array([0, 1, 3, 2])]  # after a CNOT


def _rotation(half: Array) -> Array:
  """$R_y$ of half an angle."""
  cos, sin = jnp.cos(half), jnp.sin(half)
  return jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)


def doubly_stochastic(
  unitary: Complex[Array, "*batch size size"], auxiliaries: int
) -> Float[Array, "*batch n n"]:
  """Squared moduli, summed over the auxiliary qubits, which are last, divided by s."""
  s = 2**auxiliaries
  n = unitary.shape[-1] // s
  split = unitary.reshape(*unitary.shape[:-2], n, s, n, s)
  return (split.real**2 + split.imag**2).sum((-3, -1)) / s


def closed(
  plan: Float[Array, "*batch n n"], valid: Array
) -> Float[Array, "*batch n n"]:
  r"""Doubly stochastic among valid tokens alone, zero elsewhere.

  What valid rows give to padding, r, and valid columns get from it, c, have the same
  sum, and $r c^T / \sum r$ is added: padding hands on what it gets.

  >>> plan = jnp.array([[0.5, 0.2, 0.3], [0.5, 0.5, 0.0], [0.0, 0.3, 0.7]])
  >>> jax.jit(closed)(plan, jnp.array([True, True, False]))[:2, :2]
  Array([[0.5, 0.5],
         [0.5, 0.5]], dtype=float32)
  """
  rows, columns = valid[..., :, None], valid[..., None, :]
  given = jnp.where(rows & ~columns, plan, 0.0).sum(-1)
  got = jnp.where(~rows & columns, plan, 0.0).sum(-2)
  total = given.sum(-1, keepdims=True)
  share = got / jnp.where(total > 0, total, 1.0)
  whole = plan + given[..., :, None] * share[..., None, :]
  return jnp.where(rows & columns, whole, 0.0)
