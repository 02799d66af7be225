r"""Nonlinear part of a dual map: a small network that sees the whole sequence.

A token's dual depends on the tokens that compete for the same keys. Each sequence is
therefore summed up in a context c: the means over its tokens of learned encodings of
queries and keys (Zaheer et al., 2017, "Deep Sets"), and the deviation of each feature.
One hidden layer takes a token's features $x_i$ and that context:

- encodings $e_i = relu(q_i Q + a)$ and $d_j = relu(k_j K + b)$;
- context $c = (\bar e, \bar d, deviations(x))$;
- dual $f_i = f^{linear}_i + relu(x_i X + (c - s) C + h) \cdot o$,

with s a constant, the context of a typical sequence. Beyond the paper, whose map is
linear.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from asap_jax.dual_map.features import Features, times
from asap_jax.masses import Masses, centre, mean, zero_invalid
from asap_jax.numerics import exact_einsum

# Keeps the gradient of the deviation of a feature that does not vary finite.
_VARIANCE_FLOOR = 1e-12

# An array; anything in a tree that JAX or Optax maps over.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
  """Parameters of the network of one layer: a pytree; names as in the module docstring.

  Attributes:
    query_kernel: Q, `[heads, dim, encoding]`.
    query_bias: a, `[heads, encoding]`.
    key_kernel: K, `[heads, dim, encoding]`.
    key_bias: b, `[heads, encoding]`.
    feature_kernel: X, `[heads, features, hidden]`.
    context_kernel: C, `[heads, 2 encoding + features, hidden]`.
    context_shift: s, `[heads, 2 encoding + features]`; its gradient is zero.
    hidden_bias: h, `[heads, hidden]`.
    output: o, `[heads, hidden]`.
  """

  query_kernel: Leaf
  query_bias: Leaf
  key_kernel: Leaf
  key_bias: Leaf
  feature_kernel: Leaf
  context_kernel: Leaf
  context_shift: Leaf
  hidden_bias: Leaf
  output: Leaf


def init_network(
  rng: jax.Array, heads: int, dim: int, features: int, hidden: int
) -> Network:
  """Network whose output is zero, for inputs of unit deviation.

  Of `hidden` units in the hidden layer; half as many encode queries, and keys.

  Raises:
    ValueError: if `hidden` is below two.
  """
  if hidden < 2:
    raise ValueError(f"hidden={hidden}: expected at least two units, or 0 for none")
  encoding = hidden // 2
  context = 2 * encoding + features
  keys = iter(jax.random.split(rng, 6))

  def normal(*shape, scale):
    return scale * jax.random.normal(next(keys), (heads, *shape))

  return Network(
    query_kernel=normal(dim, encoding, scale=dim**-0.5),
    query_bias=normal(encoding, scale=0.5),
    key_kernel=normal(dim, encoding, scale=dim**-0.5),
    key_bias=normal(encoding, scale=0.5),
    feature_kernel=normal(features, hidden, scale=features**-0.5),
    context_kernel=normal(context, hidden, scale=context**-0.5),
    context_shift=jnp.zeros((heads, context)),
    hidden_bias=jnp.zeros((heads, hidden)),
    output=jnp.zeros((heads, hidden)),
  )


def context_of(
  network: Network,
  features: Features,
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  key_weights: Masses = None,
) -> Float[Array, "*batch heads context"]:
  """Context c of each sequence and head; arguments as in `apply_network`."""
  queries = _encoding(query, features.weights, network.query_kernel, network.query_bias)
  keys = _encoding(key, key_weights, network.key_kernel, network.key_bias)
  deviations = jnp.sqrt(features.variances() + _VARIANCE_FLOOR)
  return jnp.concatenate([queries, keys, deviations], axis=-1)


def apply_network(
  network: Network,
  features: Features,
  query: Float[Array, "*batch heads n dim"],
  key: Float[Array, "*batch heads m dim"],
  key_weights: Masses = None,
) -> Float[Array, "*batch heads n"]:
  """Nonlinear part of the dual, centred over the valid queries.

  Works under jit, vmap and grad. Queries or keys with weight zero change nothing; the
  masses of the queries come with their features.
  """
  context = context_of(network, features, query, key, key_weights)
  context = context - jax.lax.stop_gradient(network.context_shift)
  offset = exact_einsum("...hc,hcw->...hw", context, network.context_kernel)
  offset = (offset + network.hidden_bias)[..., None, :]
  products = centre(features.times(network.feature_kernel), features.weights, axis=-2)
  hidden = jax.nn.relu(products + offset)
  return centre(times(hidden, network.output[..., None])[..., 0], features.weights)


def _encoding(
  tokens: Array, weights: Masses, kernel: Array, bias: Array
) -> Float[Array, "*batch heads encoding"]:
  """Mean of relu(kernel^T token + bias) over the valid tokens."""
  # Padding may hold anything: none of it may reach a gradient.
  tokens = zero_invalid(tokens, weights, axis=-2)
  units = jax.nn.relu(times(tokens, kernel) + bias[..., None, :])
  return mean(units, weights, axis=-2)[..., 0, :]
