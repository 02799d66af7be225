"""The teacher: OTT-JAX's Sinkhorn, its exact gradient, and starts for its iterations.

`sinkhorn` runs a fixed number of iterations, `gradient` differentiates them, `starts`
names the duals that they may start at, and `initializer` starts any OTT-JAX problem
between point clouds at Gaussian or sliced potentials. OTT is imported where it runs, so
that compiled models are served without it.
"""

from asap_jax.teacher.sinkhorn import sinkhorn_duals, sinkhorn_source_dual
from asap_jax.teacher.starts import Start, starting_dual

__all__ = ["Start", "sinkhorn_duals", "sinkhorn_source_dual", "starting_dual"]
