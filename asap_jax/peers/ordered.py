"""Attentions whose plan depends on the order of tokens: those that are valid in front.

The i-th valid query and the i-th valid key are one token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from asap_jax.attention.inputs import Inputs


class Ordered:
  """Queries and keys with valid tokens in front, and the way back.

  Args:
    inputs: of a core, as many queries as keys.
    name: of the attention, for errors.

  Raises:
    ValueError: if there are not as many queries as keys.
  """

  def __init__(self, inputs: Inputs, name: str):
    n, m = inputs.query.shape[-2], inputs.key.shape[-2]
    if n != m:
      raise ValueError(
        f"query has {n} tokens, key {m}: {name} needs as many keys as queries"
      )
    self.query, self.key, self._masks = inputs.query, inputs.key, inputs.masks
    queries, keys = inputs.masks
    if queries is not None and keys is not None:
      self._rows, self._columns = (
        jnp.argsort(~mask, axis=-1, stable=True) for mask in (queries, keys)
      )
      self.query = jnp.take_along_axis(self.query, self._rows[..., None], -2)
      self.key = jnp.take_along_axis(self.key, self._columns[..., None], -2)

  @property
  def valid(self) -> Bool[Array, "*batch n"] | None:
    """Places that valid queries take, or `None` for all."""
    queries = self._masks[0]
    return None if queries is None else -jnp.sort(-queries.astype(jnp.int8)) > 0

  def restored(self, plan: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The plan with tokens where they were; zero at padding.

    An element with more valid queries than keys, or fewer, is NaN.
    """
    queries, keys = self._masks
    if queries is None or keys is None:
      return plan
    rows, columns = (jnp.argsort(x, axis=-1) for x in (self._rows, self._columns))
    plan = jnp.take_along_axis(plan, rows[..., :, None], -2)
    plan = jnp.take_along_axis(plan, columns[..., None, :], -1)
    plan = jnp.where(queries[..., :, None] & keys[..., None, :], plan, 0.0)
    same = queries.sum(-1) == keys.sum(-1)
    return jnp.where(same[..., None, None], plan, jnp.nan)
