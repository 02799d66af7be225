"""Every peer with options, learned parameters and its reference, on shared inputs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import peer_references as papers

from asap_jax.peers import ATTENTIONS, DifferentialParameters, Pivot

BATCH, N, M, HEADS, DIM, VALUES, SLICES, RANK = 2, 6, 9, 2, 4, 3, 3, 3
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


QUERY = 2 * normal(BATCH, N, HEADS, DIM)
KEY, VALUE = normal(BATCH, M, HEADS, DIM), normal(BATCH, M, HEADS, VALUES)
QUERY_MASK = jnp.asarray([[1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]], bool)
KEY_MASK = jnp.arange(M) < jnp.asarray([[7], [4]])
# For peers that need as many keys as queries: the same number in other places.
SQUARE_MASK = jnp.asarray([[0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]], bool)
SCALE = DIM**-0.5
DIRECTIONS = normal(HEADS, SLICES, DIM)
COTANGENT = normal(BATCH, N, HEADS, VALUES)


@dataclasses.dataclass(frozen=True)
class Case:
  """A peer under test.

  Attributes:
    name: in `ATTENTIONS`.
    plan: `plan(q, k, head, logits, **learned)` in NumPy, on present points.
    options: static arguments.
    learned: arrays, passed by keyword.
    square: whether n = m is needed.
    bias: whether a bias is taken.
    ordered: whether queries and keys belong together, so that both keep their order.
    finish: what follows the product with the values, `finish(out, **learned)`.
  """

  name: str
  plan: Callable[..., np.ndarray]
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  learned: dict[str, Any] = dataclasses.field(default_factory=dict)
  square: bool = False
  bias: bool = True
  ordered: bool = False
  finish: Callable[..., np.ndarray] = lambda out, **_: out

  def function(self, *inputs, **given):
    """The attention function, jitted, with its options bound."""
    return JITTED[self.name](*inputs, **self.options | given)

  def gradient(self, inputs, learned, mask=None):
    """Gradients and output of <output, COTANGENT>, under the case's mask by default."""
    return self._gradient(inputs, learned, self.mask if mask is None else mask)

  @functools.cached_property
  def _gradient(self):
    def loss(inputs, learned, mask):
      out = self.function(*inputs, mask=mask, **learned)
      return jnp.vdot(out, COTANGENT), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

  def __call__(self, *inputs, **given):
    """The peer with its own learned parameters."""
    return self.function(*inputs, **self.learned | given)

  @property
  def inputs(self):
    return QUERY, KEY[:, : self.m], VALUE[:, : self.m]

  @property
  def m(self):
    return N if self.square else M

  @property
  def key_mask(self):
    return SQUARE_MASK if self.square else KEY_MASK

  @property
  def mask(self):
    return QUERY_MASK[:, None, :, None] & self.key_mask[:, None, None, :]

  def reference(self, query, key, value, masked, bias=None, scale=SCALE, learned=None):
    """Outputs and plans of the reference, zero at absent tokens."""
    learned = self.learned if learned is None else learned
    learned = jax.tree.map(lambda x: np.asarray(x, np.float64), learned)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros((*query.shape[:3], value.shape[-1]))
    plans = np.zeros((query.shape[0], HEADS, query.shape[1], key.shape[1]))
    for b, h in np.ndindex(query.shape[0], HEADS):
      rows, columns = np.arange(query.shape[1]), np.arange(key.shape[1])
      if masked:
        rows, columns = (np.flatnonzero(x[b]) for x in (QUERY_MASK, self.key_mask))
      q, k = query[b, rows, h], key[b, columns, h]
      logits = scale * q @ k.T
      if bias is not None:
        logits = logits + np.asarray(bias[b, h], np.float64)[np.ix_(rows, columns)]
      plan = self.plan(q, k, h, logits, **learned)
      plans[b, h][np.ix_(rows, columns)] = plan
      output[b, rows, h] = self.finish(plan @ value[b, columns, h], **learned)
    return output, plans


PIVOT = Pivot(normal(HEADS, RANK, DIM), normal(HEADS, RANK))
PARAMETERS = DifferentialParameters(
  *(0.5 * normal(DIM // 2) for _ in range(4)), gain=1 + 0.1 * normal(VALUES)
)


def _esp(q, k, h, logits, directions=None, *, hard):
  axes = np.eye(DIM) if directions is None else directions[h]
  return papers.esp(SCALE * q, SCALE * k, axes, 0.3, 2.0, hard)


def _differential(q, k, h, logits, parameters):
  scale = (DIM / 2) ** -0.5
  return papers.differential(q, k, parameters, 0.4, scale, 0.0, True)


# Attention functions, jitted, with the options that tests vary static.
STATIC = (
  "dropout_rate", "deterministic", "dtype", "is_causal", "scale", "epsilon",
)  # fmt: skip
OPTIONS = {
  "sinkhorn": ("iterations",),
  "kernel_sinkhorn": ("iterations",),
  "sinkformer": ("half_steps",),
  "lot": ("iterations",),
  "esp": ("hard",),
  "qontot": ("layers", "auxiliaries"),
  "differential": ("normalise",),
}
JITTED = {
  name: jax.jit(function, static_argnames=(*STATIC, *OPTIONS.get(name, ())))
  for name, function in ATTENTIONS.items()
}

CASES = {
  "kernel_sinkhorn": Case(
    "kernel_sinkhorn",
    lambda q, k, h, s: papers.kernel_sinkhorn(s, 4),
    {"iterations": 4},
  ),
  **{
    f"sinkformer {count}": Case(
      "sinkformer",
      lambda q, k, h, s, count=count: papers.sinkformer(s, count),
      {"half_steps": count},
    )
    for count in (2, 5)
  },
  "lot": Case(
    "lot",
    lambda q, k, h, s, pivot: papers.low_rank(
      q, k, [x[h] for x in pivot], SCALE, iterations=3
    ),
    {"iterations": 3},
    {"pivot": PIVOT},
    bias=False,
  ),
  "esp": Case(
    "esp",
    functools.partial(_esp, hard=False),
    {"sort_temperature": 0.3, "inverse_temperature": 2.0},
    {"directions": DIRECTIONS},
    square=True,
    bias=False,
  ),
  "esp hard": Case(
    "esp",
    functools.partial(_esp, hard=True),
    {"inverse_temperature": 2.0, "hard": True},
    square=True,
    bias=False,
  ),
  "swgg": Case(
    "swgg",
    lambda q, k, h, s, directions: papers.sliced(q, k, s, directions[h], np.inf),
    learned={"directions": DIRECTIONS},
  ),
  "est": Case(
    "est",
    lambda q, k, h, s, directions, inverse_temperature: papers.sliced(
      q, k, s, directions[h], inverse_temperature
    ),
    learned={"directions": DIRECTIONS, "inverse_temperature": jnp.float32(1.5)},
  ),
  "est square": Case(
    "est",
    lambda q, k, h, s: papers.sliced(q, k, s, np.eye(DIM), 1.5),
    {"inverse_temperature": 1.5},
    square=True,
  ),
  "qr": Case(
    "qr",
    lambda q, k, h, s: papers.squares(np.linalg.qr(s + np.eye(len(s)))[0]),
    square=True,
    bias=False,
    ordered=True,
  ),
  "cayley": Case(
    "cayley",
    lambda q, k, h, s, alpha: papers.cayley(alpha * s),
    learned={"alpha": jnp.float32(0.7)},
    square=True,
    bias=False,
    ordered=True,
  ),
  "qontot": Case(
    "qontot",
    lambda q, k, h, s, theta: papers.qontot(s, theta[h], 3, data=3, auxiliaries=1),
    {"layers": 3, "auxiliaries": 1},
    {"theta": normal(HEADS, 64)},
    square=True,
    bias=False,
    ordered=True,
  ),
  "differential": Case(
    "differential",
    _differential,
    {"initial": 0.4},
    {"parameters": PARAMETERS},
    finish=lambda out, parameters: papers.rms_norm(out, parameters.gain, 0.4),
  ),
}


def sown_weights(function, *inputs, **options):
  """What an attention function sows into the module that it is given."""
  sown = {}

  class Module:
    def sow(self, kind, name, value):
      sown[kind, name] = value

  @jax.jit
  def run(inputs):
    function(*inputs, module=Module(), **options)
    return sown["intermediates", "attention_weights"]

  return run(inputs)


def forms_matrix(function, *inputs):
  """Whether a function forms a matrix of queries by keys anywhere."""
  n, m = inputs[0].shape[1], inputs[1].shape[1]
  assert n != m or n not in (HEADS, DIM, SLICES, RANK)
  return f"{n}x{m}x" in jax.jit(function).lower(*inputs).as_text()
