"""Exported files in ONNX Runtime."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np


def onnx_function(path: pathlib.Path, threads: int) -> Callable[..., np.ndarray]:
  """The first output of a file in ONNX Runtime, of arrays in the file's order."""
  session = _session(path, threads)
  wanted = [each.name for each in session.get_inputs()]

  def run(*arrays: np.ndarray) -> np.ndarray:
    return session.run(None, dict(zip(wanted, arrays, strict=True)))[0]

  return run


def _session(path: pathlib.Path, threads: int) -> Any:
  import onnxruntime  # of the extra `onnx`

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.inter_op_num_threads = 1
  # Waiting threads of one session would take the time of the next.
  options.add_session_config_entry("session.intra_op.allow_spinning", "0")
  providers = ["CPUExecutionProvider"]
  return onnxruntime.InferenceSession(str(path), options, providers=providers)
