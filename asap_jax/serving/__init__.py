"""Models as files that are served without this package.

`exporting` writes StableHLO, which JAX alone runs, and `onnx_files` ONNX, with
attention in the `plain` form that its operators have. `functions` says what a model is
as a function of arrays, `symbols` which of their sizes are open, and `files` writes
whole files.
"""

from asap_jax.serving.exporting import export
from asap_jax.serving.onnx_files import export_onnx

__all__ = ["export", "export_onnx"]
