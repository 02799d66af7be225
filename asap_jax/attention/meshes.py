"""Attention where JAX writes into types how arrays are spread over devices.

It does so for explicit axes of a mesh, and inside of `jax.shard_map`; then every array
that is joined, split or carried by a loop has to say so, too. What an attention does is
local to each sequence and head, so here it need not: outside it has the right types.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jaxtyping import Array

from asap_jax.numerics import varying_as, varying_axes

Arguments = dict[str, Any]


class Attended(NamedTuple):
  """What comes of an attention.

  Attributes:
    values: `[batch..., n, heads, features]`.
    number: that comes with them, or `None`; under explicit axes it is the same on all
      devices, and inside of `jax.shard_map` that of each.
    weights: to be sown, `[batch..., heads, n, m]`, or `None`.
  """

  values: Array
  number: Array | None = None
  weights: Array | None = None


def on_mesh(
  attend: Callable[[Arguments], Attended],
  arguments: Arguments,
  *,
  has_number: bool = False,
  has_weights: bool = False,
) -> Attended:
  """`attend(arguments)`, whatever their types say of a mesh.

  Args:
    attend: without side effects, which would not leave a mesh.
    arguments: with `query` and `value`, whose shardings the result has.
    has_number: whether `attend` gives one.
    has_weights: likewise.
  """
  leaves, structure = jax.tree.flatten(arguments)
  places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

  def run(*arrays: Array) -> Attended:
    own = dict(zip(places, arrays, strict=True))
    given = [own.get(i, leaf) for i, leaf in enumerate(leaves)]
    return attend(jax.tree.unflatten(structure, given))

  arrays = [leaves[i] for i in places]
  query, value = (jax.typeof(arguments[name]) for name in ("query", "value"))
  mesh = query.sharding.mesh
  if AxisType.Explicit in mesh.axis_types:
    # The compiler finds the shardings inside.
    *batch, rows, heads, _ = query.sharding.spec
    sharding = functools.partial(NamedSharding, mesh)
    shardings: list[Any] = [
      sharding(PartitionSpec(*batch, rows, heads, value.sharding.spec[-1])),
      sharding(PartitionSpec()) if has_number else None,
      sharding(PartitionSpec(*batch, heads, rows, None)) if has_weights else None,
    ]
    return auto_axes(run, out_sharding=Attended(*shardings))(*arrays)
  varying = frozenset().union(*map(varying_axes, arrays))
  return _locally(run, varying, arrays) if varying else attend(arguments)


def _locally(
  run: Callable[..., Attended], axes: frozenset[str], arrays: list[Array]
) -> Attended:
  """`run(*arrays)` on each device by itself, unchecked; in reverse mode only."""
  moving = [jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) for x in arrays]
  shared = [axes - varying_axes(x) for x in arrays]
  unchecked = functools.partial(
    jax.shard_map,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    axis_names=set(),
    check_vma=False,
  )
  pulls: list[Any] = []

  def typed(tree: Any) -> Any:
    return jax.tree.map(lambda array: varying_as(array, *arrays), tree)

  @jax.custom_vjp
  def call(*arrays: Array) -> Attended:
    return typed(unchecked(lambda *each: run(*_untyped(each)))(*arrays))

  def forward(*arrays: Array) -> tuple[Attended, list[Array]]:
    def local(*arrays: Array) -> tuple[Attended, list[Array]]:
      arrays = _untyped(arrays)

      def of_moving(*moved: Array) -> Attended:
        left = iter(moved)
        return run(
          *(next(left) if m else x for x, m in zip(arrays, moving, strict=True))
        )

      floats = [x for x, m in zip(arrays, moving, strict=True) if m]
      out, pull = jax.vjp(of_moving, *floats)
      kept, structure = jax.tree.flatten(pull)
      pulls.append(structure)
      return out, kept

    return typed(unchecked(local)(*arrays))

  def backward(kept: list[Array], out_bar: Attended) -> tuple[Array | None, ...]:
    def local(kept: list[Array], out_bar: Attended) -> tuple[Array, ...]:
      kept, out_bar = _untyped((kept, out_bar))
      return jax.tree.unflatten(pulls[-1], kept)(out_bar)

    bars = iter(typed(unchecked(local)(kept, out_bar)))
    # What all devices share has the sum of their cotangents.
    return tuple(
      jax.lax.psum(next(bars), tuple(same)) if m and same else next(bars) if m else None
      for m, same in zip(moving, shared, strict=True)
    )

  call.defvjp(forward, backward)
  return call(*arrays)


def _untyped(tree: Any) -> Any:
  """Arrays without axes in their types: as of whatever is computed unchecked."""

  def one(array: Array) -> Array:
    if array.dtype == bool:
      return array & True
    is_number = jax.numpy.issubdtype(array.dtype, jax.numpy.number)
    return array * jax.numpy.ones((), array.dtype) if is_number else array

  return jax.tree.map(one, tree)
