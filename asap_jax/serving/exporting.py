"""One file that runs a model wherever there is JAX, and nothing else."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.sites import find_held, find_sinkhorn
from asap_jax.serving.files import Path, check_free, write_whole
from asap_jax.serving.functions import Call, arguments_of, described, function_of
from asap_jax.serving.symbols import Symbolic, open_shapes

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")


def export(
  model: Any,
  example_inputs: Any,
  path: Path | None = None,
  *,
  platforms: Sequence[str] = PLATFORMS,
  symbolic: Symbolic = "b, ...",
  constraints: Sequence[str] = (),
  call: Call | None = None,
  overwrite: bool = False,
) -> bytes:
  """Writes a model as StableHLO: it is served without this package, Flax or its source.

  A process that has JAX alone (and flatbuffers, which JAX reads such files with) runs
  `jax.export.deserialize(file.read()).call(x)`, in jit or not. The file holds program
  and weights. It stays readable for six months at least after newer versions of JAX
  (`jax.export`'s own promise). Outputs are the model's under jit, to the last bit where
  all sizes are known; one program for all sizes may take other blocks of the batch, and
  differs by rounding. It has no gradient.

  Args:
    model: an NNX module, compiled or not; exported is its evaluation mode, without
      dropout, whatever its own mode is. Or a function of arrays: a Linen module's is
      `functools.partial(module.apply, variables)`.
    example_inputs: an array, or a tuple of what the model is called with; pytrees of
      arrays or of `jax.ShapeDtypeStruct`. Their values do not matter.
    path: file to write, whole or not at all; `None` for the bytes alone.
    platforms: what it is to run on, `"cpu"`, `"cuda"`, `"rocm"`, `"tpu"`. Where the
      fastest attention differs between them, the file holds several.
    symbolic: sizes that are left open, as `jax.export.symbolic_args_specs` has them:
      for each axis a number, a name, or `_` for the example's, and `...` for all that
      follow. One text for all inputs, or one each: `("b, n, ...", "b, _, n, n")`, for
      tokens and their mask, leaves batch and length open. `None` leaves nothing open.
      All attention functions of this package take any batch and any length from two
      on; a length that is open takes the forms of long sequences.
    constraints: what is known of the sizes, such as `"n <= 256"`, which may bring back
      the forms of short sequences.
    call: how the model is given its inputs, such as `lambda model, x, mask: model(x,
      mask=mask)`.
    overwrite: whether a file at `path` may be replaced.

  Returns:
    The file's content.

  Raises:
    FileExistsError: if there is a file at `path` and `overwrite` is false.
    ValueError: if an argument makes no sense, or the model does not allow a size to be
      open that is to be.

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    >>> x = jax.numpy.ones((3, 6, 8))
    >>> content = export(layer, x, platforms=("cpu",))
    >>> served = jax.export.deserialize(content)
    >>> served.in_avals[0].shape, served.call(x[:2]).shape
    ((b, 6, 8), (2, 6, 8))
  """
  check_free(path, overwrite)
  platforms = _checked(platforms)
  run = function_of(model, call)
  arguments = described(arguments_of(example_inputs))
  shapes = open_shapes(arguments, symbolic, constraints)
  _check_implementations(model, platforms, symbolic)
  try:
    exported = jax.export.export(jax.jit(run), platforms=platforms)(*shapes)
  except Exception as error:
    if symbolic is None:
      raise
    _retry_closed(run, arguments)
    raise ValueError(
      f"symbolic={symbolic!r}: the model does not take such sizes; expected fewer open "
      f"ones, or symbolic=None ({type(error).__name__}: {error})"
    ) from error
  content = bytes(exported.serialize())
  if path is not None:
    write_whole(path, content, overwrite)
  return content


def _checked(platforms: Sequence[str]) -> tuple[str, ...]:
  if isinstance(platforms, str) or not platforms or set(platforms) - set(_KNOWN):
    raise ValueError(
      f"platforms={platforms!r}: expected some of {', '.join(_KNOWN)}, in a tuple"
    )
  return tuple(platforms)


def _check_implementations(
  model: Any, platforms: tuple[str, ...], symbolic: Symbolic
) -> None:
  """Raises ValueError where an attention is bound to what the file could not hold."""
  if not isinstance(model, nnx.Module):
    return
  named = {site.name: site.teacher.implementation for site in find_sinkhorn(model)}
  for (held_by, attribute), held in find_held(model, AsapAttention).items():
    named[".".join(map(str, (*held_by, attribute)))] = held.implementation
  for name, implementation in named.items():
    if implementation == "cudnn" and (platforms != ("cuda",) or symbolic is not None):
      raise ValueError(
        f"symbolic={symbolic!r}, platforms={platforms}: {name} has implementation="
        "'cudnn', which knows its sizes and runs on cuda alone; expected symbolic=None "
        "and platforms=('cuda',), or another implementation"
      )


def _retry_closed(run: Any, arguments: tuple[Any, ...]) -> None:
  """Raises what the model says to its own example: then no open size is at fault."""
  jax.eval_shape(run, *arguments)
