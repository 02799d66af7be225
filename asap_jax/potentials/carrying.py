"""Sorts that carry values along, for accelerators: no gather, scatter or loop.

Arrays are `[..., points]` here. A GPU and above all a TPU read one number after another
where places are looked up, so that values travel through the sort beside their keys,
and back through a second one whose keys are the places they came from. All that is
compiled is sorts along the last axis, shifts and selects: nothing depends on data,
and nothing crosses sequences, so that batch and heads may be sharded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped


def places_of(x: Shaped[Array, "*batch n"]) -> Int[Array, "*batch n"]:
  """Places 0, 1, ... along the last axis."""
  return jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


@jax.custom_jvp
def sort_with(
  keys: Shaped[Array, "*batch n"], *values: Shaped[Array, "*batch n"]
) -> tuple[Array, ...]:
  """Keys in ascending order, the places they came from, and values moved with them.

  Equal keys keep their order. Works under jit, vmap and grad, in forward mode too.
  """
  # Places are the second operand: XLA sorts stably by them, instead of adding its own.
  operands = keys, places_of(keys), *values
  return tuple(jax.lax.sort(operands, num_keys=1, is_stable=True))


@sort_with.defjvp
def _sort_with_jvp(primals, tangents):
  # The rule of `jax.lax.sort` would gather. It is what remains where JAX drops this
  # one, in a loop that is differentiated twice: slower there, and as right.
  keys, order, *values = sort_with(*primals)
  still = np.zeros(order.shape, jax.dtypes.float0)
  to = _inverse(order)
  of_keys, *of_values = (_moved(t, to, order) for t in tangents)
  return (keys, order, *values), (of_keys, still, *of_values)


@jax.custom_jvp
def move(
  places: Int[Array, "*batch n"], *values: Shaped[Array, "*batch n"]
) -> tuple[Array, ...]:
  """Values at the places of a permutation: value i goes to `places[i]`.

  Works under jit, vmap and grad, in forward mode too.
  """
  return tuple(jax.lax.sort((places, *values), num_keys=1, is_stable=False))[1:]


@move.defjvp
def _move_jvp(primals, tangents):
  places = primals[0]
  back = _inverse(places)
  return move(*primals), tuple(_moved(t, places, back) for t in tangents[1:])


def _moved(tangent: Array, to: Array, back: Array) -> Array:
  """A tangent at the places `to` of a permutation, whose inverse is `back`.

  JAX cannot transpose a sort. But it transposes the solution of a linear system to the
  solution of the transposed one, here a sort again; the system's own product, a gather,
  never runs. One system a tangent: of those together it must transpose all or none.
  """
  if tangent.dtype == jax.dtypes.float0:
    return tangent
  return jax.lax.custom_linear_solve(
    lambda moved: jnp.take_along_axis(moved, to, axis=-1),
    tangent,
    solve=lambda _, tangent: move(to, tangent)[0],
    transpose_solve=lambda _, moved: move(back, moved)[0],
  )


def _inverse(places: Array) -> Array:
  return move(places, places_of(places))[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def hold(
  known: Bool[Array, "*batch n"], values: Float[Array, "*batch n"], backwards: bool
) -> Float[Array, "*batch n"]:
  """For each place the value at the last one up to it that is known.

  `backwards` takes the first one from it on. Where there is none it is zero. The known
  values ascend. Works under jit, vmap and grad, in forward mode too.
  """
  none = jnp.inf if backwards else -jnp.inf
  extreme = jax.lax.cummin if backwards else jax.lax.cummax
  held = extreme(jnp.where(known, values, none), values.ndim - 1, reverse=backwards)
  return jnp.where(held == none, 0.0, held)


@hold.defjvp
def _hold_jvp(backwards, primals, tangents):
  known, _ = primals
  return hold(*primals, backwards), _copied(known, tangents[1], backwards)


@jax.custom_jvp
def alike(
  first: Bool[Array, "*batch n"], values: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
  """Values that equal the first of their run already, with the gradient of that one.

  `first` tells where runs begin, the first of them at place zero.
  """
  return values


@alike.defjvp
def _alike_jvp(primals, tangents):
  return alike(*primals), _copied(primals[0], tangents[1], backwards=False)


def _copied(known: Array, tangent: Array, backwards: bool) -> Array:
  """As `hold`, of tangents, which do not ascend; zero where there is none.

  They are copied twice as far each time, over the bits of a length. For a TPU that is
  twice the code of a cumulative maximum, and forward potentials do without.
  """
  n, by = known.shape[-1], 1
  while by < n:
    step = -by if backwards else by
    tangent = jnp.where(known, tangent, shift(tangent, step))
    known |= shift(known, step)
    by *= 2
  return jnp.where(known, tangent, 0.0)


def shift(x: Shaped[Array, "*batch n"], by: int) -> Shaped[Array, "*batch n"]:
  """Values moved up by so many places, or down; zeros where none came from."""
  edges = [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)]
  return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
