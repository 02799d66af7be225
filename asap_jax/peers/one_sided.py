"""One-sided compiled attention: a predicted key-side dual and one softmax pass."""

from jaxtyping import Array

from asap_jax.attention.functions import check_heads
from asap_jax.attention.inputs import Inputs
from asap_jax.attention.signature import attention_fn
from asap_jax.dual_map.predict import DualMap, predict_dual
from asap_jax.peers.lot import softmax_with


@attention_fn
def one_sided_attention(inputs: Inputs, *, dual_map: DualMap) -> Array:
  """Softmax attention whose logits carry a predicted dual of the keys.

  The closure of `asap_jax.asap_attention` (Tran, Milkert and Hyde, 2026, arXiv
  2605.12879) computes g from a predicted f; here g itself is predicted, which saves
  the pass over queries. Rows are exact; nothing corrects the columns, so that the dual
  map's error is theirs. Works under jit, vmap and grad, in `dual_map` too.

  Args:
    inputs: all arguments of `asap_jax.attention.AttentionFn`; see there, and
      `asap_jax.sinkhorn_attention` for the mask. The prediction does not see a bias.
    dual_map: parameters calibrated with roles swapped: its queries are the keys times
      scale / epsilon, its keys the queries without it, and its target the centred g of
      `asap_jax.sinkhorn_duals`. Closures and relaxation are without effect.

  Returns:
    As `asap_jax.sinkhorn_attention`.

  Raises:
    ValueError: as `asap_jax.sinkhorn_attention`, and if `dual_map` does not fit.
  """
  check_heads(dual_map, inputs)
  g = predict_dual(
    dual_map,
    inputs.key * inputs.scale,
    inputs.query / inputs.scale,
    inputs.key_mask,
    inputs.query_mask,
  )
  return inputs.attend(softmax_with(g, inputs.logits, *inputs.masks))
