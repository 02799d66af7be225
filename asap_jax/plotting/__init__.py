"""Figures: functions of arrays that draw on Matplotlib axes and return them.

Without `axes` they draw on a new figure, which is no part of pyplot's state and which a
notebook shows when a cell ends in it: `plot_plan(plan).figure`. Series differ in marker
or line as well as in colour. Needs Matplotlib, which comes with the extra
`experiments`.
"""

from asap_jax.plotting.depth import plot_curves, plot_paths, plot_rank
from asap_jax.plotting.frontier import CUTS_FAMILY, plot_frontier, plot_report
from asap_jax.plotting.length import plot_scaling
from asap_jax.plotting.plans import (
  plot_column_sums,
  plot_plan,
  plot_plans,
  plot_sinks,
)
from asap_jax.plotting.points import (
  plot_clouds,
  plot_coupling,
  plot_dual,
  plot_potentials,
)
from asap_jax.plotting.style import series_style, subplots

__all__ = [
  "CUTS_FAMILY",
  "plot_clouds",
  "plot_column_sums",
  "plot_coupling",
  "plot_curves",
  "plot_dual",
  "plot_frontier",
  "plot_paths",
  "plot_plan",
  "plot_plans",
  "plot_potentials",
  "plot_rank",
  "plot_report",
  "plot_scaling",
  "plot_sinks",
  "series_style",
  "subplots",
]
