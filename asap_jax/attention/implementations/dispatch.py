"""The plan of some closures, given to the implementation that serves."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from asap_jax.attention.implementations import xla_short
from asap_jax.attention.implementations.choice import (
  Gradient,
  Implementation,
  PerPlatform,
  gradient_for,
  narrow,
)
from asap_jax.attention.implementations.chunked import chunked_attention
from asap_jax.attention.implementations.cudnn import cudnn_attention
from asap_jax.attention.implementations.iterated import (
  iterated_attention,
  iterated_plan,
)
from asap_jax.attention.implementations.pallas import pallas_attention
from asap_jax.attention.implementations.streamed import streamed_attention
from asap_jax.attention.implementations.xla import (
  predicted_attention,
  scaled_attention,
)
from asap_jax.attention.inputs import Inputs
from asap_jax.c_transform.scaling_domain import scaled_plan
from asap_jax.dual_map.predict import DualMap, Steps
from asap_jax.teacher.starts import Start


@dataclasses.dataclass(frozen=True)
class ClosedPlan:
  """The plan of some closures, to be applied to values without being formed.

  Attributes:
    inputs: queries, keys, bias and masks.
    dual: to start at, `[batch..., heads, n or m]`; or the name of a query-side one
      (`asap_jax.teacher.starts`), which is computed where it costs least.
    count: closures.
    steps: what is between them and whose dual it is, as in `asap_jax.closures`.
    implementation: which serves (`choose_for`).
    dual_map: what predicted the dual, to be fused with the closures where that is
      faster; or `None`.
    gradient: of closures that are plain iterations, as many as one likes, whose
      gradient has to be cheap whatever runs forward: that of
      `asap_jax.attention.implementations.iterated`, or of `streamed` beside it, in
      reverse mode only. `None` is the implementation's own.
    tolerance: of iterations that stop early, or `None`.
  """

  inputs: Inputs
  dual: Array | Start
  count: int
  steps: Steps
  implementation: Implementation | PerPlatform
  dual_map: DualMap | None = None
  gradient: Gradient | None = None
  tolerance: float | None = None

  def dense(self) -> Array:
    """Weights, `[batch..., heads, n, m]`."""
    logits, masks = self.inputs.logits, self.inputs.masks
    if self.gradient:
      return iterated_plan(
        logits, self._dual, self.count, *masks, tolerance=self.tolerance
      )
    return scaled_plan(logits, self._dual, self.count, *masks, **self.steps).dense()

  @property
  def _dual(self) -> Array:
    if isinstance(self.dual, str):
      return self.inputs.starting_dual(self.dual)
    return self.dual

  def apply(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    """Weights times values."""
    if isinstance(self.implementation, PerPlatform):
      # One function for all platforms of a name: JAX traces it once.
      applied = {
        name: functools.partial(self._served_by(name).apply, precision=precision)
        for name in self.implementation
      }
      served = {k: applied[name] for k, name in self.implementation._asdict().items()}
      return jax.lax.platform_dependent(value, **served)
    close = functools.partial(self._close, precision=precision)
    dual_map, inputs = self.dual_map, self.inputs
    if dual_map is None or dual_map.network is not None or self.implementation != "xla":
      return close(value)
    if inputs.segments is not None:
      return close(value)  # their duals are predicted one after another
    n, m = inputs.query.shape[-2], inputs.key.shape[-2]
    # With masks, or from the key side, XLA does not fuse prediction and closures.
    fuses = all(mask is None for mask in inputs.masks) and dual_map.side == "query"
    short = xla_short.is_short(self.count, n, m, *inputs.masks)
    if short and (fuses or dual_map.is_sliced):
      fused = xla_short.predicted_values
    elif dual_map.is_sliced or inputs.bias is not None:
      return close(value)
    else:
      fused = predicted_attention
    predict_and_close = functools.partial(fused, dual_map, inputs, precision=precision)
    return jax.lax.platform_dependent(value, cpu=predict_and_close, default=close)

  def _served_by(self, name: Implementation) -> "ClosedPlan":
    """The same plan on a platform where this one serves, which nobody named."""
    gradient = self.gradient and gradient_for(self.inputs, None, name)
    return dataclasses.replace(self, implementation=name, gradient=gradient)

  def _close(self, value: Array, precision: jax.lax.PrecisionLike) -> Array:
    inputs = self.inputs
    segments = inputs.segments
    options: dict[str, Any] = {
      "bias": inputs.bias,
      "precision": precision,
      "segments": segments,
    }
    iterated = self.gradient == "iterated"
    # The former computes a named start itself, of one sequence.
    start: Any = self.dual if iterated and segments is None else self._dual
    iterate: Callable[..., Array] = functools.partial(
      iterated_attention if iterated else streamed_attention,
      *(inputs.query, inputs.key, value, start),
      *(self.count, *inputs.masks),
      precision=precision,
      tolerance=self.tolerance,
      segments=segments,
      **({"bias": inputs.bias} if iterated else {}),
    )
    if self.gradient and self.implementation not in ("cudnn", "pallas"):
      return iterate()
    if isinstance(start, str):
      start = self._dual
    tokens: tuple[Any, ...] = inputs.query, inputs.key, value, start
    functions: dict[object, Callable[..., Array]] = {
      "xla": scaled_attention,
      "chunked": chunked_attention,
      "pallas": pallas_attention,
    }
    attend = functions.get(self.implementation, cudnn_attention)
    if attend is cudnn_attention:
      tokens = *narrow(inputs), *tokens[2:]
      options["scale"] = inputs.scale
    if self.implementation in ("cudnn", "pallas"):
      del options["segments"]  # there are none (`choose`)
    has_other = self.gradient and self.implementation != "pallas"
    if has_other:
      # Nothing of it is kept where a gradient is asked for.
      tokens = jax.lax.stop_gradient(tokens)
    out = attend(*tokens, self.count, *inputs.masks, **options, **self.steps)
    return iterate(forward=out) if has_other else out
