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
    inside = AxisType.Manual in mesh.axis_types
    specs = None if has_number or inside else _local_specs(arguments)
    if specs is not None:
      return _by_device(attend, arguments, specs, has_weights)
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


def _local_specs(arguments: Arguments) -> dict[str, Any] | None:
  """How arrays have to be spread, so that each device attends by itself.

  `None` where one cannot: where sequences or groups of heads are spread, where weights
  are dropped at random, whose numbers depend on shapes, and for arrays of which it is
  not known what their axes are.
  """
  query = jax.typeof(arguments["query"])
  *batch, rows, heads, dim = _spec_of(query)
  kv_heads = arguments["key"].shape[-2]
  if rows or dim or (heads and kv_heads != query.shape[-2]):
    return None
  if arguments["dropout_rate"] != 0.0 and not arguments["deterministic"]:
    return None
  tokens = PartitionSpec(*batch, None, heads, None)
  whole = (*batch, heads, None, None)

  def of_pairs(array: Array) -> PartitionSpec:
    own = whole[len(whole) - array.ndim :]
    sizes = zip(array.shape, own, strict=True)
    return PartitionSpec(*(None if size == 1 else axis for size, axis in sizes))

  def of_tokens(array: Array) -> PartitionSpec:
    of_heads = (heads,) * (array.ndim - len(batch) - 1)
    return PartitionSpec(*batch, *of_heads, None)

  known: dict[str, Callable[[Array], PartitionSpec]] = {
    "query": lambda _: tokens,
    "key": lambda _: tokens,
    "value": lambda _: tokens,
    "mask": of_pairs,
    "bias": of_pairs,
    "segment_ids": lambda _: PartitionSpec(*batch, None),
    "query_weights": of_tokens,
    "key_weights": of_tokens,
    "dual_map": lambda leaf: PartitionSpec(heads, *(None,) * (leaf.ndim - 1)),
    "epsilon": lambda _: PartitionSpec(),
    "dropout_rng": lambda _: PartitionSpec(),
  }
  arrays = {name: value for name, value in arguments.items() if jax.tree.leaves(value)}
  found: dict[str, Any] = {}
  for name, value in arrays.items():
    leaves = [x for x in jax.tree.leaves(value) if isinstance(x, jax.Array)]
    if leaves and name not in known:
      return None
    if leaves:
      found[name] = jax.tree.map(known[name], value)
  return found


def _by_device(
  attend: Callable[[Arguments], Attended],
  arguments: Arguments,
  specs: dict[str, Any],
  has_weights: bool,
) -> Attended:
  """`attend` of what each device has: nothing crosses devices."""
  query = arguments["query"]
  mesh = (
    jax.typeof(query).sharding.mesh
    if isinstance(query, jax.core.Tracer)
    else query.sharding.mesh
  )
  *batch, _, heads, _ = specs["query"]
  placed = {
    name: jax.tree.map(
      lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)),
      arguments[name],
      spec,
    )
    for name, spec in specs.items()
  }
  of_weights: Any = PartitionSpec(*batch, heads) if has_weights else None
  out_specs = Attended(specs["query"], None, of_weights)
  run = jax.shard_map(
    lambda own: attend(arguments | own),
    mesh=mesh,
    in_specs=(specs,),
    out_specs=out_specs,
    check_vma=False,
  )
  return run(placed)


def _spec_of(kind: Any) -> tuple[Any, ...]:
  spec = tuple(kind.sharding.spec)
  return (*spec, *(None,) * (kind.ndim - len(spec)))


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
