"""Arithmetic that must not be rounded: dtypes, promotion and products."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from asap_jax.platforms import by_platform
from asap_jax.sizes import Size

T = TypeVar("T")


def with_usual_promotion(function: Callable[..., T]) -> Callable[..., T]:
  """The function under JAX's usual promotion of ranks and dtypes.

  Who forbids it (`jax_numpy_rank_promotion`, `jax_numpy_dtype_promotion`) looks for
  faults of their own code, not of this package's. Backward passes are traced later than
  their function was, and need it themselves.
  """

  @functools.wraps(function)
  def run(*args: Any, **kwargs: Any) -> T:
    with (
      jax.numpy_rank_promotion("allow"),
      jax.numpy_dtype_promotion("standard"),
    ):
      return function(*args, **kwargs)

  return run


def float_dtype(*arrays: Array) -> jnp.dtype:
  """Dtype of the arrays together, float32 or better."""
  return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def logits_einsum(
  subscripts: str,
  *operands: Array,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Array:
  """`jnp.einsum` that makes logits, or goes back to what they were made of.

  Logits are exponentiated, so that their rounding errors are relative errors of a
  plan. In full precision, as `exact_einsum`, unless another is asked for.
  """
  return jnp.einsum(
    subscripts,
    *operands,
    precision=jax.lax.Precision.HIGHEST if precision is None else precision,
    preferred_element_type=preferred_element_type,
  )


def exact_einsum(subscripts: str, *operands: Array) -> Array:
  """`jnp.einsum` of float arrays, in the operands' full precision.

  By default a GPU rounds float32 products to TF32 and a TPU to bfloat16: too coarse for
  values that are sorted, inverted or exponentiated.
  """

  def product(*operands):
    return jnp.einsum(
      subscripts,
      *operands,
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=float_dtype(*operands),
    )

  matmul = functools.partial(as_matmul, subscripts)
  return by_platform(*operands, default=product, onnx=matmul)


def for_each(batch: Sequence[Size], array: Array) -> Array:
  """An operand of a product, `[..., a, b]`, for each element of the other's batch.

  With one for all of the batch XLA transposes the other operand; ONNX's products of
  matrices broadcast by themselves.
  """
  return by_platform(
    array,
    default=lambda array: jnp.broadcast_to(array, (*batch, *array.shape[-2:])),
    onnx=lambda array: array,
  )


def as_matmul(subscripts: str, left: Array, right: Array) -> Array:
  """An einsum that is a product of stacks of matrices or vectors, as `jnp.matmul`.

  ONNX Runtime has products of matrices by themselves; its einsum is slower, and does
  not broadcast.

  Args:
    subscripts: with one letter that is summed over, such as `"...nd,...d->...n"`.
    left: its axes in whatever order.
    right: likewise.
  """
  inputs, result = subscripts.replace("...", "").split("->")
  of_left, of_right = inputs.split(",")
  (summed,) = set(of_left) & set(of_right) - set(result)
  shared = [name for name in of_left if name in of_right and name != summed]
  rows = [name for name in of_left if name not in of_right]
  columns = [name for name in of_right if name not in of_left]

  def ordered(array: Array, own: str, wanted: list[str]) -> Array:
    places = [own.index(name) - len(own) for name in wanted]
    ends = range(-len(own), 0)
    return array if places == list(ends) else jnp.moveaxis(array, places, list(ends))

  left = ordered(left, of_left, [*shared, *rows, summed])
  right = ordered(right, of_right, [*shared, summed, *columns])
  left = left if rows else left[..., None, :]
  right = right if columns else right[..., None]
  out = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
  out = out if columns else out[..., 0]
  out = out if rows else (out[..., 0, :] if columns else out[..., 0])
  return ordered(out, "".join([*shared, *rows, *columns]), list(result))


def narrow_einsum(subscripts: str, left: Array, right: Array) -> Array:
  """`exact_einsum` of two stacks of matrices, one of which has few rows or columns.

  For a TPU as products and sums, in float32 as they are: its matrix unit would multiply
  six times, and code and time to compile are two to four times as much.

  Args:
    subscripts: such as `"...nd,...rd->...nr"`.
    left: `[..., a, b]`.
    right: likewise, broadcast against it.
  """
  return by_platform(
    left,
    right,
    tpu=functools.partial(multiplied_and_summed, subscripts),
    default=functools.partial(exact_einsum, subscripts),
  )


def multiplied_and_summed(subscripts: str, left: Array, right: Array) -> Array:
  """An einsum of two stacks of matrices without a product of matrices."""
  inputs, result = subscripts.replace("...", "").split("->")
  (summed,) = set(inputs) - set(result) - {","}
  names = result + summed

  def aligned(array: Array, own: str) -> Array:
    if names.index(own[0]) > names.index(own[1]):
      array = jnp.swapaxes(array, -1, -2)
    (absent,) = set(names) - set(own)
    return jnp.expand_dims(array, names.index(absent) - len(names))

  dtype = float_dtype(left, right)
  both = zip((left, right), inputs.split(","), strict=True)
  left, right = (aligned(array, own).astype(dtype) for array, own in both)
  return jnp.sum(left * right, axis=-1)


def varying_as(array: Array, *others: Array) -> Array:
  """`array`, of a type that varies wherever one of the others does."""
  axes = frozenset().union(*map(varying_axes, others)) - varying_axes(array)
  return jax.lax.pcast(array, tuple(axes), to="varying") if axes else array


def varying_axes(array: Array) -> frozenset[str]:
  """Axes along which devices hold other values, inside of `jax.shard_map`."""
  kind = jax.typeof(array)
  # Older versions of JAX have it in the type itself.
  return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def repeated(
  step: Callable[..., tuple[Array, ...]], times: int, *start: Array
) -> tuple[Array, ...]:
  """`step` of its own results, so many times.

  For a TPU as a loop: written out, steps of small matrices are most of the code of an
  attention, and most of the time to compile it.
  """
  # A loop takes what it returns, types inside of `jax.shard_map` included.
  start = tuple(varying_as(each, *start) for each in start)

  def loop(*start):
    return jax.lax.fori_loop(0, times, lambda _, each: step(*each), start)

  def written_out(*each):
    for _ in range(times):
      each = step(*each)
    return each

  return by_platform(*start, tpu=loop, default=written_out)
