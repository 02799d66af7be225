"""The implementation of the closures that runs: named, or the best available.

- `"xla"`: an n x m kernel; any dtype and device.
- `"chunked"`: O(n + m) memory in plain XLA; any dtype and device.
- `"cudnn"`: O(n + m) memory, cuDNN's fused kernels; bfloat16 and float16 on an NVIDIA
  GPU.
- `"pallas"`: O(n + m) memory, kernels of our own for a TPU; only where it is named, for
  none has timed them there. Interpreted, slowly, on other devices.

All of them are one function up to rounding. The choice is made for the platform that is
lowered for, whatever devices the host has: where it differs, the lowered program holds
the one of its own platform, and of several if it is exported for several.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.attention.implementations import pallas
from asap_jax.attention.implementations.cudnn import fused_attention, unsupported
from asap_jax.attention.implementations.cudnn_sums import head_dim
from asap_jax.attention.inputs import Inputs
from asap_jax.sizes import is_known, known_or

Implementation = Literal["xla", "chunked", "cudnn", "pallas"]
Gradient = Literal["iterated", "streamed"]

# Entries above which a kernel is not formed: 2 GiB of float32 in all, for XLA holds two
# arrays of so many (compiled for a TPU v5e; a gradient of several iterations, four). On
# a CPU heads come one after another: 768 MiB of one head, in three arrays.
_DENSE = 2**28
_DENSE_HEAD = 2**26
# Below this length two fused calls a closure are not worth their overhead; for many
# closures, which read one kernel again and again, below the other. (H100, JAX 0.11.2,
# bfloat16: one, two and 20 iterations of 512 heads of 197 tokens take 0.48, 0.77 and
# 5.1 ms with cuDNN and 0.38, 0.45 and 1.8 without; of 64 heads of 1,024 tokens 0.41,
# 0.77 and 4.8, and 0.78, 1.00 and 4.6, in three times the memory. Lengths
# between the two were not measured.)
_CUDNN_LENGTH, _CUDNN_LENGTH_OF_MANY, _CUDNN_FEW = 512, 1024, 3
# What is taken for a batch, and for a length, that is not known in an export.
_USUAL_BATCH, _USUAL_LENGTH = 32, 1024


class PerPlatform(NamedTuple):
  """The implementation that serves on each platform, where they differ."""

  cpu: Implementation
  cuda: Implementation
  default: Implementation


def gradient_for(
  inputs: Inputs, named: Implementation | None, chosen: Implementation | PerPlatform
) -> Gradient | None:
  """Whose gradient plain iterations have: that of `iterated`, or of `streamed`.

  `None` is that of the implementation itself: `streamed` knows no bias. cuDNN's own
  takes six times as long as the former's, which is where kernels of all heads fit and
  no other was named, and more than twice as long as the latter's (H100, JAX 0.11.2,
  bfloat16, 20 iterations of 64 heads of 1,024 tokens: a training step of 61, 11 and
  25 ms).
  """
  if isinstance(chosen, PerPlatform):
    found = (gradient_for(inputs, named, name) for name in chosen)
    return next((each for each in found if each), None)
  if chosen == "xla" or (chosen == "cudnn" and named is None and _fits(inputs)):
    return "iterated"
  # Where weights are needed they are formed, by whatever implementation.
  return "streamed" if inputs.bias is None or inputs.dropout.needs_weights else None


def _fits(inputs: Inputs) -> bool:
  return _entries(inputs.query, inputs.key) <= _DENSE


def _entries(query: Array, key: Array) -> int:
  """Of all kernels together."""
  sizes = [known_or(size, _USUAL_BATCH) for size in query.shape[:-2]]
  return math.prod(sizes) * math.prod(_lengths(query, key))


def _lengths(*tokens: Array) -> list[int]:
  return [known_or(each.shape[-2], _USUAL_LENGTH) for each in tokens]


def choose_for(
  inputs: Inputs,
  implementation: Implementation | None,
  count: int,
  *,
  stops: bool = False,
) -> Implementation | PerPlatform:
  """`choose` for one call of an attention, before anything is computed.

  While JAX traces, the platform is not known yet: then the choice is one for each, or
  their name if it is the same. Where the weights are formed, any implementation will
  do.

  Args:
    inputs: of the call.
    implementation: named, or `None`.
    count: closures.
    stops: whether they may stop early, which cuDNN's form does not, nor the chunked
      one with a bias.
  """
  if implementation is not None and inputs.dropout.needs_weights:
    _check_name(implementation)
    return implementation
  options = {
    "bias": inputs.bias,
    "scale": inputs.scale,
    "count": count,
    "packed": inputs.segments is not None,
  }
  tokens = *narrow(inputs), inputs.value

  def chosen(platform: str | None) -> Implementation:
    found = choose(implementation, *tokens, **options, platform=platform)
    return _that_stops(inputs, found) if stops else found

  if implementation is not None or not isinstance(tokens[0], jax.core.Tracer):
    return chosen(None)
  served = PerPlatform(*map(chosen, ("cpu", "cuda", "tpu")))
  return served.cpu if len(set(served)) == 1 else served


def _that_stops(inputs: Inputs, chosen: Implementation) -> Implementation:
  if chosen == "cudnn":
    chosen = "xla" if _fits(inputs) else "chunked"
  if chosen == "chunked" and inputs.bias is not None:
    raise ValueError(
      "tolerance with a bias and implementation='chunked', or inputs that need it: "
      "expected tolerance=None, no bias, or implementation='xla'"
    )
  return chosen


def narrow(inputs: Inputs) -> tuple[Array, Array]:
  """Queries and keys in the dtype that they came in."""
  # The keys came in this dtype: nothing is rounded.
  return inputs.unscaled, inputs.key.astype(inputs.unscaled.dtype)


def choose(
  implementation: Implementation | None,
  query: Array,
  key: Array,
  value: Array,
  *,
  bias: Array | None = None,
  scale: Any = 1.0,
  count: int = 1,
  packed: bool = False,
  platform: str | None = None,
) -> Implementation:
  """The implementation that serves these arguments: the one named, or the best.

  The best is `"cudnn"` where it can run and the lengths are worth it, `"chunked"` where
  the n x m kernel would be large, else `"xla"`. JAX looks for cuDNN and an NVIDIA GPU
  while it traces: on a host without them no call of cuDNN can be lowered, not for an
  export to `cuda` either, and the best there is what it is without cuDNN.

  Args:
    implementation: a name, or `None` for the best.
    query: `[..., n, dim]`, in the dtype of the attention's inputs.
    key: `[..., m, dim]`.
    value: `[..., m, features]`.
    bias: added to the logits, or `None`.
    scale: of the logits.
    count: closures.
    packed: whether there are segments, which fused kernels do not know.
    platform: `"cpu"`, `"cuda"` (or `"gpu"`), `"tpu"`; by default that of the queries'
      device, and inside of jit, where they have none, of JAX's default device.

  Raises:
    ValueError: if the name is unknown, or what it names cannot serve these arguments;
      the message says why, and what to do instead.
  """
  if implementation is not None:
    _check_name(implementation)
  if implementation in ("xla", "chunked"):
    return implementation
  reason = _no_segments(packed)
  if not is_known(*query.shape, *key.shape):
    reason = "sizes that are known only when it runs (those of `jax.export`)"
  if implementation == "pallas":
    reason = reason or pallas.unsupported(query, key, value, bias)
    if reason is not None:
      raise ValueError(f"implementation='pallas' cannot serve: {reason}")
    return "pallas"
  platform = platform or _platform(query)
  reason = reason or unsupported(query, key, value, bias, scale)
  reason = reason or _no_cudnn(
    platform, query.dtype, head_dim(query.shape[-1], value.shape[-1])
  )
  if implementation == "cudnn":
    if reason is not None:
      raise ValueError(f"implementation='cudnn' cannot serve: {reason}")
    return "cudnn"
  n, m = _lengths(query, key)
  least = _CUDNN_LENGTH if count <= _CUDNN_FEW else _CUDNN_LENGTH_OF_MANY
  if reason is None and min(n, m) >= least:
    return "cudnn"
  # On a CPU heads come one after another, but not with a bias.
  if platform == "cpu" and bias is None:
    entries, most = n * m, _DENSE_HEAD
  else:
    entries, most = _entries(query, key), _DENSE
  return "chunked" if entries > most else "xla"


def _no_segments(packed: bool) -> str | None:
  return "packed sequences; pass implementation='chunked' or 'xla'" if packed else None


def _check_name(implementation: str) -> None:
  names = get_args(Implementation)
  if implementation not in names:
    raise ValueError(
      f"implementation={implementation!r}: expected None or one of {', '.join(names)}"
    )


def _platform(array: Array | None) -> str:
  """That of the device of an array; where it has none, of JAX's default device."""
  if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
    return next(iter(array.devices())).platform
  device = jax.config.jax_default_device  # type: ignore[attr-defined]
  return (
    jax.default_backend() if device is None else getattr(device, "platform", device)
  )


@functools.cache
def _no_cudnn(platform: str, dtype: jnp.dtype, dim: int) -> str | None:
  """Why cuDNN has no fused attention of head dimension `dim` there, or `None`."""
  instead = "pass implementation=None for the best that can, 'chunked' or 'xla'"
  if platform not in ("gpu", "cuda"):
    return f"the device is a {platform}, cuDNN runs on NVIDIA GPUs; {instead}"
  x = jax.ShapeDtypeStruct((1, _CUDNN_LENGTH, 1, dim), dtype)
  try:
    jax.eval_shape(functools.partial(fused_attention, scale=1.0), x, x, x)
  # JAX checks version, device and shape when it traces the call.
  except (RuntimeError, ValueError) as error:
    return f"head dimension {dim} with the columns of the duals: {error} {instead}"
  return None
