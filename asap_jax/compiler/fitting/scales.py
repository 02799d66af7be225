"""Scale of each parameter of a dual map, such that one learning rate fits all."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from asap_jax.compiler.fitting.samples import Sample
from asap_jax.dual_map.features import dual_features, features_of
from asap_jax.dual_map.network import context_of, init_network
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.masses import Masses, mean


def add_network(
  dual_map: DualMap, sample: Sample, hidden: int, rng: jax.Array
) -> DualMap:
  """Linear `dual_map` with a fresh network, which changes no prediction yet.

  The deviations of the sample's queries and keys scale the network's inputs.

  Raises:
    ValueError: if `hidden` is below two.
  """
  heads, _, dim = dual_map.directions.shape
  network = init_network(rng, heads, dim, dual_map.weights.shape[-1], hidden)
  # Encoders first: the scale of the context depends on them.
  for names in (
    ("query_kernel", "query_bias", "key_kernel", "key_bias"),
    ("feature_kernel", "context_kernel", "output"),
  ):
    scale = parameter_scale(replace(dual_map, network=network), sample).network
    scaled = {name: getattr(network, name) * getattr(scale, name) for name in names}
    network = replace(network, **scaled)
  dual_map = replace(dual_map, network=network)
  typical = _context(dual_map, sample).mean(0)
  return replace(dual_map, network=replace(network, context_shift=typical))


@jax.jit
def parameter_scale(dual_map: DualMap, sample: Sample) -> DualMap:
  """Scale of each parameter: parameter = scale x standardised value.

  Weights are scaled by the inverse deviation of their input over the sample, and those
  whose output is the dual by the deviation of the dual that `dual_map` predicts;
  directions and relaxation have scale one.
  """
  activation, masks = sample.activation, sample.activation.masks
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
  """Context of each sequence, `[batch, heads, context]`."""
  activation, masks = sample.activation, sample.activation.masks
  tokens = activation.query, activation.key
  features = features_of(*tokens, dual_map.directions, dual_map.features, *masks)
  return context_of(dual_map.network, features, *tokens, masks[1])


def _deviation(values: jax.Array, weights: Masses) -> jax.Array:
  """Deviations of the columns of `[batch, heads, n, columns]`, one where they are zero.

  `[heads, columns]`.
  """
  centred = values - mean(values, weights, axis=-2).mean(0)
  power = mean(centred**2, weights, axis=-2).mean((0, 2))
  return jnp.sqrt(jnp.where(power > 1e-12, power, 1.0))
