"""Packed sequences, unpacked: what is fitted is an operator of one sequence."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax.attention.inputs import Activation


def unpacked(call: Activation) -> Activation:
  """What an attention saw, each packed sequence in an element of the batch.

  Host code. Lengths are rounded up to powers of two and the batch to a multiple of what
  it was, by padding, so that batches have few different shapes.

  Args:
    call: heads in front, with one batch axis.

  Raises:
    ValueError: if heads are packed each in its own way.
  """
  if call.segments is None:
    return call
  queries, keys = (np.asarray(ids) for ids in call.segments)
  if queries.shape[-2] > 1:
    raise ValueError(
      f"mask packs {queries.shape[-2]} heads each in its own way: expected one for all "
      "heads, [batch, 1, n, m]"
    )
  queries, keys = queries[:, 0], keys[:, 0]
  found = [
    (element, segment)
    for element in range(len(queries))
    for segment in np.intersect1d(queries[element], keys[element]).tolist()
    if segment > 0
  ]
  size = len(queries) * max(math.ceil(len(found) / len(queries)), 1)
  rows, columns = (_places(ids, found, size) for ids in (queries, keys))
  elements = np.zeros(size, int)
  elements[: len(found)] = [element for element, _ in found]

  def taken(tokens: jax.Array, places: np.ndarray) -> jax.Array:
    of_elements = jnp.moveaxis(tokens, -3, -2)[elements[:, None], np.maximum(places, 0)]
    own = jnp.where((places >= 0)[..., None, None], of_elements, 0.0)
    return jnp.moveaxis(own, -3, -2)

  bias = call.bias
  if bias is not None:
    pairs = (
      elements[:, None, None],
      slice(None),
      np.maximum(rows, 0)[:, :, None],
      np.maximum(columns, 0)[:, None, :],
    )
    bias = jnp.moveaxis(bias[pairs], -1, 1)
  return Activation(
    query=taken(call.query, rows),
    key=taken(call.key, columns),
    bias=bias,
    query_mask=jnp.asarray(rows >= 0)[:, None],
    key_mask=jnp.asarray(columns >= 0)[:, None],
    precision=call.precision,
  )


def _places(ids: np.ndarray, found: list[tuple[int, int]], size: int) -> np.ndarray:
  """Places of the tokens of each sequence, `[size, longest]`, else -1."""
  own = [np.nonzero(ids[element] == segment)[0] for element, segment in found]
  longest = max(map(len, own), default=1)
  places = np.full((size, min(2 ** math.ceil(math.log2(longest)), ids.shape[-1])), -1)
  for row, of_sequence in zip(places, own, strict=False):
    row[: len(of_sequence)] = of_sequence
  return places
