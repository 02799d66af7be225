"""The smallest models that can be saved, with variables of any kind beside."""

import jax.numpy as jnp
from flax import nnx

from asap_jax import AsapAttention, DualMap, sinkhorn_attention


class Holder(nnx.Module):
  """Holds an attention function, and whatever else is asked for."""

  def __init__(self, attend, **variables):
    self.attend = attend
    for name, value in variables.items():
      setattr(self, name, value)


def blank(**variables):
  return Holder(sinkhorn_attention, **variables)


def compiled(value=1.0, **variables):
  weights = jnp.full((1, 2), value)
  dual_map = DualMap(jnp.ones((1, 1, 2)), weights, features=("query",))
  return Holder(AsapAttention(dual_map), **variables)


def value_of(model):
  """What `compiled` was given."""
  weights = model.attend.dual_map.weights
  assert (weights == weights[0, 0]).all()
  return float(weights[0, 0])


def entries(folder):
  """Names of everything in a folder, hidden ones too, versions without their tokens."""
  return sorted("v-" if e.name[:2] == "v-" else e.name for e in folder.iterdir())
