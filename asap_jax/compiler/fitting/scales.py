"""The scale of each parameter of a dual map, such that one learning rate fits all."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from asap_jax.compiler.fitting.samples import Sample
from asap_jax.dual_map.features import dual_features, features_of
from asap_jax.dual_map.network import context_of, init_network
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import Weights, mean


def add_network(
  dual_map: DualMap, sample: Sample, hidden: int, rng: jax.Array
) -> DualMap:
  """`dual_map` with a fresh network, which changes no prediction yet.

  Args:
    dual_map: linear.
    sample: queries and keys whose deviations scale the network's inputs.
    hidden: units of the hidden layer.
    rng: PRNG key.

  Raises:
    ValueError: if `hidden` is below two.
  """
  heads, _, dim = dual_map.directions.shape
  network = init_network(rng, heads, dim, dual_map.weights.shape[-1], hidden)
  scale = parameter_scale(replace(dual_map, network=network), sample).network
  # Encoders first: the scale of the context depends on them.
  encoders = ("query_kernel", "query_bias", "key_kernel", "key_bias")
  scaled = {name: getattr(network, name) * getattr(scale, name) for name in encoders}
  network = replace(network, **scaled)
  scale = parameter_scale(replace(dual_map, network=network), sample).network
  rest = ("feature_kernel", "context_kernel", "output")
  scaled = {name: getattr(network, name) * getattr(scale, name) for name in rest}
  typical = _context(replace(dual_map, network=network), sample).mean(0)
  network = replace(network, context_shift=typical, **scaled)
  return replace(dual_map, network=network)


@jax.jit
def parameter_scale(dual_map: DualMap, sample: Sample) -> DualMap:
  """What each parameter is, in natural units, where its standardised form is one.

  Weights count relative to the deviations of their input over the sample and of the
  dual that `dual_map` predicts; directions and relaxation have no units.
  """
  activation = sample.activation
  masks = activation.query_mask, activation.key_mask
  tokens = activation.query, activation.key
  features = dual_features(*tokens, dual_map.directions, dual_map.features, *masks)
  of_features = _deviation(features, masks[0])
  of_dual = _deviation(predict_dual(dual_map, *tokens, *masks)[..., None], masks[0])
  ones = jax.tree.map(jnp.ones_like, dual_map)
  scale = replace(ones, weights=of_dual / of_features)
  if dual_map.network is None:
    return scale
  context = _context(dual_map, sample)
  inputs = {
    "query_kernel": _deviation(tokens[0], masks[0]),
    "key_kernel": _deviation(tokens[1], masks[1]),
    "feature_kernel": of_features,
    "context_kernel": _deviation(jnp.swapaxes(context, 0, 1)[None], None),
  }
  kernels = {
    name: getattr(ones.network, name) / deviation[..., None]
    for name, deviation in inputs.items()
  }
  network = replace(ones.network, output=ones.network.output * of_dual, **kernels)
  return replace(scale, network=network)


@jax.jit
def _context(dual_map: DualMap, sample: Sample) -> jax.Array:
  """`[batch, heads, context]`."""
  activation = sample.activation
  masks = activation.query_mask, activation.key_mask
  tokens = activation.query, activation.key
  features = features_of(*tokens, dual_map.directions, dual_map.features, *masks)
  return context_of(dual_map.network, features, *tokens, masks[1])


def _deviation(values: jax.Array, weights: Weights) -> jax.Array:
  """Of each column of `[batch, heads, n, columns]`: `[heads, columns]`, one if zero."""
  centred = values - mean(values, weights, axis=-2).mean(0)
  power = mean(centred**2, weights, axis=-2).mean((0, 2))
  return jnp.sqrt(jnp.where(power > 1e-12, power, 1.0))
