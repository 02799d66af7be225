"""Which tokens may attend to which: masks taken apart, and packed sequences.

A doubly stochastic plan has valid queries and valid keys (`restrict`), in one block or
in one a segment; other functions take any pairs (`exclude`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from asap_jax.attention.inputs import Inputs, check_broadcast
from asap_jax.c_transform.segments import Segments, segments_of
from asap_jax.masses import (
  Masses,
  check_weights,
  log_masses,
  valid_pairs,
  zero_invalid,
)
from asap_jax.sizes import Size

# Of packed sequences, of queries and keys alike, or of each.
Ids = Array | tuple[Array, ...]


def restrict(
  inputs: Inputs,
  mask: jax.Array | None,
  is_causal: bool,
  segment_ids: Ids | None = None,
  max_segments: int | None = None,
) -> Inputs:
  """Inputs with the valid queries and keys of a doubly stochastic plan.

  Raises:
    ValueError: for causal use, one-token decoding, a mask that is not the outer
      product of valid queries and valid keys (or, with `max_segments`, of segments), or
      segments that are more than that.
  """
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  if is_causal:
    raise ValueError(
      "is_causal=True: a causal doubly stochastic matrix is the identity (row 1 must "
      "put all its mass on column 1, and so on); use softmax_attention in causal layers"
    )
  if n == 1 and m > 1:
    raise ValueError(
      f"query has one token, key {m}: the doubly stochastic plan of a single query is "
      "uniform whatever its content, so one-token decoding has no doubly stochastic "
      "form; use softmax_attention in decoders"
    )
  if segment_ids is not None or (mask is not None and max_segments is not None):
    return _packed(inputs, mask, segment_ids, max_segments)
  if mask is None:
    return inputs
  _check_mask(mask, inputs)
  query_mask, key_mask, is_product = _split_mask(mask, n, m)
  inputs = _zero_absent(inputs, query_mask, key_mask)
  return dataclasses.replace(
    inputs, query_mask=query_mask, key_mask=key_mask, is_product=is_product
  )


def weighted(
  inputs: Inputs,
  query_weights: Array | None,
  key_weights: Array | None,
  any_mask: bool = False,
) -> Inputs:
  """Inputs whose tokens have masses, beside the mask that was taken apart before.

  A function that takes any mask is told of the keys' by the bias, and of absent tokens
  by the pairs that may attend.

  Raises:
    ValueError: if masses do not fit the tokens, are negative or not finite, or
      sequences are packed.
  """
  if query_weights is None and key_weights is None:
    return inputs
  if inputs.segments is not None:
    raise ValueError(
      "query_weights or key_weights with packed sequences: expected None, and each "
      "sequence in an element of the batch"
    )
  given = ("query", query_weights), ("key", key_weights)
  masses = [
    _masses(f"{side}_weights", own, getattr(inputs, side), mask)
    for (side, own), mask in zip(given, inputs.masks, strict=True)
  ]
  inputs = _zero_absent(inputs, *masses)
  if not any_mask:
    return dataclasses.replace(inputs, query_mask=masses[0], key_mask=masses[1])
  allowed, bias = inputs.allowed, inputs.bias
  if key_weights is not None:
    of_keys = log_masses(masses[1])[..., None, :]
    bias = of_keys if bias is None else bias + of_keys
  shape = *inputs.query.shape[:-1], inputs.key.shape[-2]
  pairs = valid_pairs(*masses)
  assert pairs is not None  # one side has masses
  pairs = jnp.broadcast_to(pairs, shape)
  return dataclasses.replace(
    inputs,
    allowed=pairs if allowed is None else pairs & allowed,
    bias=bias,
  )


def exclude(
  inputs: Inputs,
  mask: jax.Array | None,
  is_causal: bool,
  segment_ids: Ids | None = None,
) -> Inputs:
  """Inputs with the pairs that may attend, for functions that take any mask."""
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  if mask is not None:
    _check_mask(mask, inputs)
  allowed = None if mask is None else mask != 0
  if segment_ids is not None:
    same = _segments(segment_ids, inputs).same
    allowed = same if allowed is None else allowed & same
  if is_causal:
    causal = jnp.tril(jnp.ones((n, m), bool))
    allowed = causal if allowed is None else allowed & causal
  if allowed is None:
    return inputs
  allowed = jnp.broadcast_to(allowed, (*allowed.shape[:-2], n, m))
  inputs = _zero_absent(inputs, allowed.any(-1), allowed.any(-2))
  return dataclasses.replace(inputs, allowed=allowed)


def _packed(
  inputs: Inputs,
  mask: jax.Array | None,
  segment_ids: Ids | None,
  max_segments: int | None,
) -> Inputs:
  """Inputs of packed sequences, whose plan is block-diagonal."""
  if max_segments is not None and max_segments < 1:
    raise ValueError(f"max_segments={max_segments}: expected at least one")
  if mask is not None and segment_ids is not None:
    raise ValueError(
      "mask with segment_ids: expected one of the two; a token whose id is zero is "
      "padding"
    )
  is_known = None
  if segment_ids is not None:
    segments = _segments(segment_ids, inputs)
  elif mask is not None:
    segments, is_known = _segments_of(mask, inputs)
  most = jnp.stack([ids.max(-1) for ids in segments]).max(0)[..., None, None]
  if not isinstance(most, jax.core.Tracer):
    found = int(most.max(initial=0))
    if max_segments is not None and found > max_segments:
      raise ValueError(
        f"max_segments={max_segments}: an element of the batch has {found} segments"
      )
    max_segments = max_segments or max(found, 1)
  elif max_segments is not None:
    fits = most <= max_segments
    is_known = fits if is_known is None else is_known & fits
  query_mask, key_mask = segments.masses
  inputs = _zero_absent(inputs, query_mask, key_mask)
  return dataclasses.replace(
    inputs,
    query_mask=query_mask,
    key_mask=key_mask,
    is_product=is_known,
    segments=segments,
    max_segments=max_segments,
  )


def _segments_of(mask: Array, inputs: Inputs) -> tuple[Segments, Array | None]:
  """Segments of a mask, and whether it has some; `None` where that is known."""
  n, m = inputs.query.shape[-2], inputs.key.shape[-2]
  _check_mask(mask, inputs)
  if mask.ndim < 3 or mask.shape[-2:] != (n, m):
    raise ValueError(
      f"mask has shape {mask.shape}: expected [batch..., heads or 1, {n}, {m}]"
    )
  segments, is_known = segments_of(mask.astype(bool))
  if isinstance(is_known, jax.core.Tracer):
    return segments, is_known
  if not is_known.all():
    raise ValueError(
      "mask is not that of segments: queries that share a key must share all of them; "
      "pass nnx.make_attention_mask(ids, ids, jnp.equal), or segment_ids"
    )
  return segments, None


def _segments(segment_ids: Ids, inputs: Inputs) -> Segments:
  """Segments of all heads, from ids `[batch..., n]` of both sides or of each."""
  both = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
  if len(both) != 2:
    raise ValueError(
      f"segment_ids is a tuple of {len(both)}: expected those of queries and of keys"
    )
  batch = inputs.query.shape[:-3]
  for ids, tokens in zip(both, (inputs.query, inputs.key), strict=True):
    wanted = *batch, tokens.shape[-2]
    fits = ids.shape == wanted
    if not fits or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(
        f"segment_ids has shape {ids.shape} and dtype {ids.dtype}: expected integers "
        f"{wanted}, from 1 on, and 0 at padding"
      )
    if not isinstance(ids, jax.core.Tracer) and (np.asarray(ids) < 0).any():
      raise ValueError(f"segment_ids has {ids.min()}: expected numbers from 0 on")
  return Segments(*(jnp.asarray(ids)[..., None, :] for ids in both))


def _masses(
  name: str, weights: Array | None, tokens: Array, mask: Array | None
) -> Array | None:
  """Masses of one side in front of its heads, zero where its mask says so."""
  if weights is None:
    return mask
  weights = jnp.asarray(weights)
  *batch, heads, size, _ = tokens.shape
  check_weights(name, weights, size)
  if weights.shape not in ((*batch, size), (*batch, 1, size), (*batch, heads, size)):
    raise ValueError(
      f"{name} has shape {weights.shape}: expected {(*batch, size)}, or with heads "
      f"{(*batch, heads, size)}"
    )
  weights = weights if weights.ndim == len(batch) + 2 else weights[..., None, :]
  # In NumPy, as the values of a mask.
  if not isinstance(weights, jax.core.Tracer):
    least = np.asarray(weights, np.float32)
    if not (np.isfinite(least) & (least >= 0)).all():
      raise ValueError(
        f"{name} has values from {least.min()} to {least.max()}: expected masses that "
        "are finite and not negative"
      )
  return zero_invalid(weights, mask)


def _zero_absent(inputs: Inputs, queries: Masses, keys: Masses) -> Inputs:
  """Inputs with zeros at tokens that take no part.

  Padding may hold anything, NaN included: none of it may reach a gradient.
  """
  return dataclasses.replace(
    inputs,
    query=zero_invalid(inputs.query, queries, axis=-2),
    unscaled=zero_invalid(inputs.unscaled, queries, axis=-2),
    key=zero_invalid(inputs.key, keys, axis=-2),
    value=zero_invalid(inputs.value, keys, axis=-2),
  )


def _check_mask(mask: Array, inputs: Inputs) -> None:
  check_broadcast("mask", mask, (*inputs.query.shape[:-1], inputs.key.shape[-2]))
  if mask.dtype == jnp.bool_ or isinstance(mask, jax.core.Tracer):
    return
  # In NumPy: inside of jit JAX would trace what is done with a constant too.
  values = np.asarray(mask)
  if not np.isin(values, (0, 1)).all():
    raise ValueError(
      f"mask of dtype {mask.dtype} has values from {values.min()} to {values.max()}: "
      "expected true or 1 where a query may attend to a key, and false or 0 elsewhere; "
      "what is to be added to the logits is passed as bias"
    )


def _split_mask(mask: Array, n: Size, m: Size) -> tuple[Array, Array, Array | None]:
  """Valid queries, valid keys, and whether the mask is their outer product."""
  if mask.ndim < 3 or mask.shape[-2] not in (1, n) or mask.shape[-1] not in (1, m):
    raise ValueError(
      f"mask has shape {mask.shape}: expected [batch..., heads or 1, {n}, {m}]"
    )
  if 1 in mask.shape[-2:] and n == m > 1:
    raise ValueError(
      f"mask has shape {mask.shape}, which speaks of one side alone: padding must be "
      "excluded from queries and keys, so pass nnx.make_attention_mask(query_valid, "
      "key_valid)"
    )
  mask = mask != 0
  queries, keys = mask.any(-1), mask.any(-2)
  is_product = None
  if 1 not in mask.shape[-2:]:
    product = queries[..., :, None] & keys[..., None, :]
    is_product = (mask == product).all((-2, -1), keepdims=True)
    if not isinstance(is_product, jax.core.Tracer):
      if not is_product.all():
        raise ValueError(
          "mask is not the outer product of valid queries and valid keys: a causal or "
          "block mask has no doubly stochastic plan in general; pass "
          "nnx.make_attention_mask(query_valid, key_valid); for packed sequences pass "
          "segment_ids, or bind max_segments and pass the mask of their pairs"
        )
      is_product = None
  queries = jnp.broadcast_to(queries, (*queries.shape[:-1], n))
  keys = jnp.broadcast_to(keys, (*keys.shape[:-1], m))
  return queries, keys, is_product
