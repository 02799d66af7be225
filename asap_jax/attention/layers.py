"""Flax NNX modules: a Sinkhorn layer to train, and the operator that replaces it."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from asap_jax.attention.functions import (
  Teacher,
  asap_attention,
  check_implementation,
  check_iterations,
  sinkhorn_attention,
)
from asap_jax.attention.implementations.choice import Implementation
from asap_jax.dual_map.predict import DualMap
from asap_jax.teacher.starts import Start


class SinkhornMultiHeadAttention(nnx.MultiHeadAttention):
  """`nnx.MultiHeadAttention` whose attention is doubly stochastic.

  Takes every argument of `nnx.MultiHeadAttention` but `attention_fn`, and is called
  like it. For padding pass `mask=nnx.make_attention_mask(valid, valid)`.

  Args:
    num_heads: number of heads.
    in_features: features of the input.
    *args: for `nnx.MultiHeadAttention`.
    iterations: full Sinkhorn iterations from the start; see
      `asap_jax.sinkhorn_attention`.
    epsilon: entropic regularisation; logits are divided by it.
    start: of the iterations; see `asap_jax.sinkhorn_attention`.
    tolerance: likewise.
    implementation: likewise.
    scale: of the logits, 1 / sqrt(head dimension) by default.
    max_segments: of packed sequences; with it the mask is that of their pairs, see
      `asap_jax.attention.AttentionFn`.
    decode: autoregressive decoding; only `False` is possible here.
    **kwargs: likewise; `rngs` is needed.

  Raises:
    ValueError: if `decode` is true, there are too few `iterations`, the `start` is
      unknown or the `tolerance` out of range, or the `implementation` is unknown.

  Example:
    >>> layer = SinkhornMultiHeadAttention(
    ...   2, 8, iterations=2, start="gaussian", rngs=nnx.Rngs(0))
    >>> layer(jax.numpy.ones((1, 6, 8))).shape
    (1, 6, 8)
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    *args: Any,
    iterations: int = 20,
    epsilon: float = 1.0,
    start: Start = "zero",
    tolerance: float | None = None,
    implementation: Teacher | None = None,
    scale: float | None = None,
    max_segments: int | None = None,
    decode: bool = False,
    **kwargs: Any,
  ):
    check_iterations(iterations, start, tolerance=tolerance)
    check_implementation(implementation)
    check_no_decoding(decode)
    attention_fn = functools.partial(
      sinkhorn_attention,
      iterations=iterations,
      epsilon=epsilon,
      start=start,
      tolerance=tolerance,
      implementation=implementation,
      **asked_for(scale=scale, max_segments=max_segments),
    )
    super().__init__(
      num_heads,
      in_features,
      *args,
      attention_fn=attention_fn,
      decode=decode,
      **kwargs,
    )


def asked_for(**options: Any) -> dict[str, Any]:
  """Options that are not `None`: what is saved names all that is bound, and no more."""
  return {name: value for name, value in options.items() if value is not None}


def check_no_decoding(decode: bool) -> None:
  """Raises ValueError where tokens are to come one by one."""
  if decode:
    raise ValueError(
      "decode=True: one-token decoding has no doubly stochastic form; expected False"
    )


class DualParam(nnx.Param):
  """A parameter of a dual map: an `nnx.Param` that a filter can tell from the rest.

  Example:
    >>> layer = AsapAttention(DualMap(jax.numpy.ones((1, 1, 2)), jax.numpy.ones((1, 2)),
    ...   features=("query",)))
    >>> sorted(nnx.state(layer, DualParam)["parameters"])
    ['directions', 'weights']
  """


class AsapAttention(nnx.Module):
  """A compiled attention operator with its dual map: an `attention_fn` for Flax NNX.

  It is called with the signature of `asap_jax.attention.asap_attention`, and its
  parameters train with the model's, or alone under the filter `DualParam`.

  Args:
    dual_map: calibrated parameters.
    options: further arguments bound to the attention function, such as `scale` and
      `epsilon`; hashable values, or arrays, which become constants of the state.
    implementation: see `asap_attention`; the best where it runs by default. It is no
      part of a saved model, which may be restored on another device.

  Example:
    >>> dual_map = DualMap(
    ...   jax.numpy.ones((4, 1, 8)), jax.numpy.zeros((4, 8)), features=("query",))
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> AsapAttention(dual_map)(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """

  def __init__(
    self,
    dual_map: DualMap,
    options: dict[str, Any] | None = None,
    implementation: Implementation | None = None,
  ):
    named = dual_map.to_named()
    self.parameters = nnx.Dict({name: DualParam(leaf) for name, leaf in named.items()})
    # `nnx.capture` puts an entry of its own beside the parameters.
    self.names = tuple(named)
    self.features = dual_map.features
    self.side, self.half = dual_map.side, dual_map.half
    bound = sorted((options or {}).items())
    arrays = {k: v for k, v in bound if isinstance(v, jax.Array | np.ndarray)}
    self.options = tuple((k, v) for k, v in bound if k not in arrays)
    if arrays:
      self.arrays = nnx.Dict({k: nnx.Variable(v) for k, v in arrays.items()})
    self.implementation = implementation

  @property
  def dual_map(self) -> DualMap:
    """The parameters as they stand."""
    leaves = {name: self.parameters[name][...] for name in self.names}
    return DualMap.from_named(leaves, self.features, side=self.side, half=self.half)

  @property
  def bound(self) -> dict[str, Any]:
    """Arguments of the attention function, beside the dual map."""
    arrays = {k: v[...] for k, v in getattr(self, "arrays", {}).items()}
    return {"implementation": self.implementation, **dict(self.options), **arrays}

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *args: Any,
    **kwargs: Any,
  ) -> jax.Array:
    """`asap_attention` with this dual map; see there for arguments and errors."""
    options = self.bound | kwargs
    return asap_attention(query, key, value, *args, dual_map=self.dual_map, **options)
