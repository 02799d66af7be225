"""A small model of padded sequences, with any attention, to be served."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asap_jax import AsapAttention, DualMap, sinkhorn_attention, softmax_attention
from asap_jax.dual_map.features import feature_count
from asap_jax.dual_map.network import init_network

TOKENS, WIDTH, HEADS, SLICES = 7, 8, 2, 3
DIM = WIDTH // HEADS
LINEAR = ("query", "cumulants", "gaussian_diagonal")
SLICED = ("potentials", "query", "cumulants", "transport")


class Encoder(nnx.Module):
  """Classes of sequences, from the mean of their valid tokens."""

  def __init__(self, attention_fn):
    rngs = nnx.Rngs(0)
    self.attention = nnx.MultiHeadAttention(
      HEADS,
      WIDTH,
      attention_fn=attention_fn,
      decode=False,
      # Logits large enough for one iteration not to be nearly converged.
      kernel_init=nnx.initializers.normal(1.7 / WIDTH**0.5),
      rngs=rngs,
    )
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

  def __call__(self, x, valid=None):
    mask = None if valid is None else nnx.make_attention_mask(valid, valid)
    x = self.dropout(x + self.attention(self.norm(x), mask=mask))
    if valid is None:
      return self.head(x.mean(-2))
    share = valid / valid.sum(-1, keepdims=True)
    return self.head((share[..., None] * x).sum(-2))


def dual_map(*features, hidden=0, closures=1, **static):
  """A map with random weights, of as many heads and dimensions as `Encoder` has."""
  random = np.random.default_rng(0)
  count = feature_count(features, SLICES, DIM)
  network = init_network(jax.random.key(0), HEADS, DIM, count, hidden or 2)
  made = DualMap(
    jnp.asarray(random.normal(size=(HEADS, SLICES, DIM)), jnp.float32),
    jnp.asarray(0.3 * random.normal(size=(HEADS, count)), jnp.float32),
    features,
    network=network if hidden else None,
    **static,
  )
  return made.with_closures(closures) if closures > 1 else made


@functools.cache
def encoder(kind="sliced"):
  """In training mode, with one of `ATTENTION`."""
  return Encoder(ATTENTION[kind]())


def sinkhorn(**options):
  return functools.partial(functools.partial, sinkhorn_attention, **options)


def compiled(*features, **options):
  return lambda: AsapAttention(dual_map(*features, **options))


ATTENTION = {
  "softmax": lambda: softmax_attention,
  "sliced": compiled(*SLICED),
  "network": compiled(*SLICED, hidden=4),
  "linear": compiled(*LINEAR),
  "linear@3": compiled(*LINEAR, closures=3),
  "low rank": compiled(*LINEAR, "gaussian"),
  "keys": compiled(*LINEAR, side="key"),
  "half": compiled(*LINEAR, side="key", half=True),
  "teacher": sinkhorn(iterations=20),
  "by OTT": sinkhorn(iterations=3, implementation="ott"),
  "cut": sinkhorn(iterations=3),
  "relaxed": sinkhorn(iterations=3, relaxation=1.5),
  "stopped": sinkhorn(iterations=5, tolerance=0.05),
  "gaussian": sinkhorn(iterations=2, start="gaussian"),
  "half, gaussian": sinkhorn(iterations=0, start="gaussian_full"),
}


def tokens(batch=4):
  random = np.random.default_rng(1)
  return jnp.asarray(random.normal(size=(batch, TOKENS, WIDTH)), jnp.float32)


def padded(batch=4):
  """Tokens, and which of them are valid."""
  lengths = jnp.asarray([7, 5, 3, 2])[:batch, None]
  return tokens(batch), jnp.arange(TOKENS) < lengths


def expected(model, *inputs):
  """Outputs of a model in evaluation mode."""
  evaluated = nnx.clone(model)
  evaluated.eval()
  return nnx.jit(lambda model, *inputs: model(*inputs))(evaluated, *inputs)
