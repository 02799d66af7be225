"""Models as files that are served without this package.

`exporting` writes StableHLO, which JAX alone runs. `functions` says what a model is as
a function of arrays, `symbols` which of their sizes are open, and `files` writes whole
files.
"""

from asap_jax.serving.exporting import export

__all__ = ["export"]
