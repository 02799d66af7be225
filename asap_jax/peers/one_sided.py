"""One-sided compiled attention: a predicted key-side dual and one softmax pass."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.signature import Call, attention_fn
from asap_jax.dual_map.predict import DualMap, predict_dual


@attention_fn
def one_sided_attention(call: Call, *, dual_map: DualMap) -> Array:
  """Softmax attention whose logits carry a predicted dual of the keys.

  The closure of `asap_jax.asap_attention` (Tran, Milkert and Hyde, 2026, arXiv
  2605.12879) computes g from a predicted f; here g itself is predicted, which saves
  the pass over queries. Rows are exact; nothing corrects the columns, whose error is
  that of the dual map. Works under jit, vmap and grad, in `dual_map` too.

  Args:
    call: all arguments of `asap_jax.softmax_attention`; see there, and
      `asap_jax.sinkhorn_attention` for the mask. The prediction does not see a bias.
    dual_map: parameters calibrated with roles swapped: its queries are the keys times
      scale / epsilon, its keys the queries without it, and its target the centred g of
      `asap_jax.sinkhorn_duals`. Closures and relaxation are without effect.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `dual_map` does not fit.
  """
  inputs = call.inputs
  heads, _, dim = dual_map.directions.shape
  if (heads, dim) != (inputs.query.shape[-3], inputs.query.shape[-1]):
    raise ValueError(
      f"dual_map was calibrated for {heads} heads of dimension {dim}: got "
      f"{inputs.query.shape[-3]} heads of dimension {inputs.query.shape[-1]}"
    )
  g = predict_dual(
    dual_map,
    inputs.key * call.scale,
    inputs.query / call.scale,
    inputs.key_mask,
    inputs.query_mask,
  )
  there = None if inputs.key_mask is None else inputs.key_mask[..., None, :]
  weights = jax.nn.softmax(inputs.logits + g[..., None, :], axis=-1, where=there)
  if inputs.query_mask is not None:
    weights = jnp.where(inputs.query_mask[..., None], weights, 0.0)
  return call.attend(weights)
