"""One file that runs a model in ONNX Runtime, wherever that is."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from asap_jax.attention.signature import answering
from asap_jax.platforms import only_for
from asap_jax.serving.files import Path, check_free, write_whole
from asap_jax.serving.functions import Call, arguments_of, described, function_of
from asap_jax.serving.plain import plain_attention
from asap_jax.serving.symbols import Symbolic, open_shapes

OPSET = 23
_LEAST_OPSET = 18


def export_onnx(
  model: Any,
  example_inputs: Any,
  path: Path | None = None,
  *,
  opset: int = OPSET,
  symbolic: Symbolic = "b, ...",
  call: Call | None = None,
  overwrite: bool = False,
) -> bytes:
  """Writes a model as ONNX: it is served without JAX, in ONNX Runtime for instance.

  By jax2onnx (extra `onnx`). Attention is written in a form of its own for that: in the
  log domain, right for any logits, all iterations written out, no loop and no branch.
  It is the same function up to rounding (1e-4 of outputs of size one, and far less as
  a rule).

  Args:
    model: as in `asap_jax.export`: exported is its evaluation mode.
    example_inputs: likewise; arrays, or tuples of arrays.
    path: likewise.
    opset: version of ONNX's operators, 18 to 23.
    symbolic: as in `asap_jax.export`, for the batch alone: lengths are known.
    call: likewise.
    overwrite: likewise.

  Returns:
    The file's content; inputs are `input_0`, `input_1`, and outputs `output_0`, in the
    order of the arguments.

  Raises:
    FileExistsError: if there is a file at `path` and `overwrite` is false.
    ImportError: without jax2onnx.
    ValueError: if an argument makes no sense, or the model does what ONNX cannot
      (packed sequences, attention of `asap_jax.peers`).

  Example:
    >>> import asap_jax
    >>> layer = asap_jax.SinkhornMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    >>> export_onnx(layer, jax.numpy.ones((3, 6, 8)), "model.onnx", opset=5)
    Traceback (most recent call last):
    ValueError: opset=5: expected 18 to 23
  """
  check_free(path, overwrite)
  if not _LEAST_OPSET <= opset <= OPSET:
    raise ValueError(f"opset={opset}: expected {_LEAST_OPSET} to {OPSET}")
  arguments = described(arguments_of(example_inputs))
  shapes = open_shapes(arguments, symbolic, ())
  leaves, structure = jax.tree.flatten(shapes)
  specs = [_spec(leaf, symbolic) for leaf in leaves]
  run = function_of(model, call, as_numpy=True)
  to_onnx = _converter()

  def flat(*arrays: Any) -> Any:
    with answering(plain_attention), only_for("onnx"):
      return run(*jax.tree.unflatten(structure, arrays))

  count = len(jax.tree.leaves(jax.eval_shape(flat, *jax.tree.leaves(arguments))))
  made = to_onnx(
    flat,
    inputs=specs,
    opset=opset,
    input_names=[f"input_{i}" for i in range(len(specs))],
    output_names=[f"output_{i}" for i in range(count)],
  )
  content = bytes(made.SerializeToString())
  if path is not None:
    write_whole(path, content, overwrite)
  return content


def _spec(leaf: jax.ShapeDtypeStruct, symbolic: Symbolic) -> jax.ShapeDtypeStruct:
  """What jax2onnx takes: names of axes as text."""
  shape: list[Any] = []
  for axis, size in enumerate(leaf.shape):
    if not jax.export.is_symbolic_dim(size):
      shape.append(int(size))
    elif axis == 0 and str(size).isidentifier():
      shape.append(str(size))
    else:
      raise ValueError(
        f"symbolic={symbolic!r}: expected a name for the first axis alone, the batch; "
        "sorts and softmax of ONNX are made for one length"
      )
  return jax.ShapeDtypeStruct(tuple(shape), np.dtype(leaf.dtype))


def _converter() -> Callable[..., Any]:
  try:
    return importlib.import_module("jax2onnx").to_onnx
  except ImportError as error:
    raise ImportError(
      "export_onnx needs jax2onnx: pip install asap_jax[onnx]"
    ) from error
