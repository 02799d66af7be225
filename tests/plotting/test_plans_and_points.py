"""Figures of plans, points, duals and depth: what is drawn is what was given."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pages import ROOT
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from asap_jax import Potentials, plotting
from asap_jax.metrics import attention_sink_share
from asap_jax.plotting import plot_column_sums, plot_plan

RANDOM = np.random.default_rng(0)
PLANS = RANDOM.dirichlet(np.ones(6), size=(3, 4))  # [3, 4, 6]


@pytest.fixture
def axes():
  return Figure().subplots()


def line_of(axes, label):
  (line,) = (line for line in axes.lines if line.get_label() == label)
  return line


def styles_of(lines):
  return {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}


def test_plan_is_drawn_dark_where_mass_lies(axes):
  plan = np.array([[0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
  assert plot_plan(plan, axes, "title", maximum=1.0) is axes
  (image,) = axes.images
  np.testing.assert_array_equal(image.get_array(), plan)
  assert image.norm.vmax == 1.0
  shades = image.to_rgba(plan)[..., 0]
  assert shades[1, 0] > shades[2, 0] > shades[1, 1]


def test_column_sums_are_relative_to_a_doubly_stochastic_plan(axes):
  plan = np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])  # columns should sum to 1.5
  plot_column_sums(plan, axes)
  heights = [bar.get_height() for bar in axes.patches]
  np.testing.assert_allclose(heights, [2.1 / 1.5, 0.9 / 1.5])
  assert "0.400" in axes.get_xlabel()


@pytest.mark.parametrize("function", [plot_plan, plot_column_sums])
def test_plans_of_several_heads_are_refused(function, axes):
  with pytest.raises(ValueError, match=r"expected \[n, m\]"):
    function(np.ones((2, 3, 3)), axes)


def test_plans_share_their_greys_and_stand_above_their_column_sums():
  given = {"teacher": np.diag([0.5, 1.0]), "other": np.full((2, 2), 0.25)}
  panels = plotting.plot_plans(given)
  assert panels.shape == (2, 2)
  assert [panel.get_title() for panel in panels[0]] == ["teacher", "other"]
  for plan, above, below in zip(given.values(), *panels, strict=True):
    np.testing.assert_array_equal(above.images[0].get_array(), plan)
    np.testing.assert_allclose([bar.get_height() for bar in below.patches], plan.sum(0))
  greys = [panel.images[0].norm.vmax for panel in panels[0]]
  np.testing.assert_allclose(greys, np.quantile(given["teacher"], 0.995))
  again = plotting.plot_plans(given, Figure().subplots(2, 2), maximum=0.7)
  assert {panel.images[0].norm.vmax for panel in again[0]} == {0.7}


def test_plans_refuse_axes_of_another_number():
  with pytest.raises(ValueError, match=r"axes has shape \(2, 3\): expected \[2, 1\]"):
    plotting.plot_plans({"a": PLANS[0]}, Figure().subplots(2, 3))


def test_sinks_begin_at_the_sink_share_times_the_keys(axes):
  assert plotting.plot_sinks({"a": PLANS, "b": PLANS[0]}, axes, "a title") is axes
  assert axes.get_title() == "a title"
  curve = line_of(axes, "a").get_ydata()
  expected = -np.sort(-PLANS.sum(1) * 6 / 4, axis=-1)
  np.testing.assert_allclose(curve, expected.mean(0))
  share = attention_sink_share(jnp.asarray(PLANS)).mean()
  np.testing.assert_allclose(curve[0], 6 * share, rtol=1e-5)
  np.testing.assert_allclose(line_of(axes, "b").get_ydata(), expected[0])
  assert len(styles_of([line_of(axes, name) for name in "ab"])) == 2


def test_potentials_stand_over_their_points_in_order(axes):
  x, y = np.array([2.0, -1.0, 0.5]), np.array([1.0, 0.0])
  potentials = Potentials(
    jnp.array([5.0, 3.0, 4.0]), jnp.array([7.0, 6.0]), jnp.ones(3)
  )
  assert plotting.plot_potentials(x, potentials, y, axes, "a title") is axes
  phi, psi = (
    line_of(axes, rf"$\{name}$ of {of}") for name, of in (("phi", "x"), ("psi", "y"))
  )
  np.testing.assert_array_equal(phi.get_xydata(), [(-1, 3), (0.5, 4), (2, 5)])
  np.testing.assert_array_equal(psi.get_xydata(), [(0, 6), (1, 7)])
  assert len(styles_of([phi, psi])) == 2
  rugs = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
  np.testing.assert_array_equal(np.concatenate(rugs), [-1.0, 0.5, 2.0, 0.0, 1.0])


def test_potentials_of_one_side_alone():
  potentials = Potentials(jnp.zeros(3), jnp.zeros(2), jnp.zeros(3))
  axes = plotting.plot_potentials(np.arange(3.0), potentials)
  assert len(axes.get_legend().texts) == 1
  with pytest.raises(ValueError, match=r"phi has shape \(3,\): expected \(4,\), as x"):
    plotting.plot_potentials(np.arange(4.0), potentials)


def test_dual_and_prediction_are_centred_and_scored(axes):
  dual = RANDOM.normal(size=(5, 8))
  shifted = dual + RANDOM.normal(size=(5, 1))
  half = 0.5 * dual + 3.0
  assert plotting.plot_dual(dual, {"shifted": shifted, "half": half}, axes) is axes
  # Of a centred dual, half of it leaves a quarter of the variance.
  exact, other = (
    line_of(axes, "shifted: $R^2$ = 1.000"),
    line_of(axes, "half: $R^2$ = 0.750"),
  )
  centred = (dual - dual.mean(-1, keepdims=True)).ravel()
  np.testing.assert_allclose(
    exact.get_xydata(), np.stack([centred] * 2, -1), atol=1e-12
  )
  np.testing.assert_allclose(other.get_ydata(), centred / 2, atol=1e-12)
  with pytest.raises(ValueError, match=r"half has shape \(8,\): expected \(5, 8\)"):
    plotting.plot_dual(dual, {"half": half[0]}, axes)


def test_clouds_lie_in_the_plane_or_on_lines_of_their_own(axes):
  plane = {"x": RANDOM.normal(size=(4, 2)), "y": jnp.ones((3, 2), jnp.bfloat16)}
  assert plotting.plot_clouds(plane, axes) is axes
  for name, points in plane.items():
    np.testing.assert_array_equal(line_of(axes, name).get_xydata(), points)
  line = {"x": np.arange(4.0), "y": np.arange(3.0)}
  axes = plotting.plot_clouds(line)
  for height, (name, points) in enumerate(line.items()):
    np.testing.assert_array_equal(line_of(axes, name).get_xdata(), points)
    assert set(line_of(axes, name).get_ydata()) == {height}
  assert [tick.get_text() for tick in axes.get_yticklabels()] == ["x", "y"]


@pytest.mark.parametrize(
  "clouds",
  [{"x": np.ones((3, 3))}, {"x": np.ones((3, 2)), "y": np.ones(3)}, {"x": np.ones(0)}],
)
def test_clouds_of_other_dimensions_are_refused(clouds):
  with pytest.raises(ValueError, match=r"has shape .*: expected \[n, 2\], or \[n\]"):
    plotting.plot_clouds(clouds)


def test_coupling_joins_points_that_exchange_mass(axes):
  x, y = (
    np.array([[0.0, 0.0], [1.0, 0.0]]),
    np.array([[0.0, 2.0], [1.0, 2.0], [2.0, 2.0]]),
  )
  plan = np.array([[0.5, 0.0, 0.25], [0.0, 1.0, 0.001]])  # the last one is too faint
  assert plotting.plot_coupling(x, y, plan, axes, names=("from", "to")) is axes
  (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
  joined = [(x[0], y[0]), (x[0], y[2]), (x[1], y[1])]
  np.testing.assert_array_equal(lines.get_segments(), joined)
  np.testing.assert_allclose(lines.get_alpha(), [0.5, 0.25, 1.0])
  np.testing.assert_array_equal(line_of(axes, "to").get_xydata(), y)


def test_coupling_of_other_shape_or_without_mass_is_refused():
  x, y = np.zeros(2), np.zeros(3)
  with pytest.raises(ValueError, match=r"plan has shape \(3, 2\): expected \[2, 3\]"):
    plotting.plot_coupling(x, y, np.ones((3, 2)))
  with pytest.raises(ValueError, match="plan holds no positive entry"):
    plotting.plot_coupling(x, y, np.zeros((2, 3)))


def test_curves_are_told_apart_without_colour(axes):
  curves = {f"c{i}": (np.arange(3.0), RANDOM.normal(size=3)) for i in range(12)}
  labels = {"xlabel": "angle", "ylabel": "cost"}
  assert plotting.plot_curves(curves, axes, "a title", **labels) is axes
  assert (axes.get_xlabel(), axes.get_ylabel()) == ("angle", "cost")
  for name, (x, y) in curves.items():
    np.testing.assert_array_equal(
      line_of(axes, name).get_xydata(), np.stack([x, y], -1)
    )
  lines = [line_of(axes, name) for name in curves]
  assert len({line.get_marker() for line in lines}) == 12
  with pytest.raises(ValueError, match=r"c, y has shape \(2,\): expected \(3,\), as x"):
    plotting.plot_curves({"c": (np.arange(3.0), np.arange(2.0))}, axes)


def test_rank_is_drawn_through_depth(axes):
  residuals = {"softmax": [1.0, 0.5, 0.2], "sinkhorn": jnp.array([1.0, 0.75, 0.5])}
  assert plotting.plot_rank(residuals, axes) is axes
  for name, values in residuals.items():
    line = line_of(axes, name)
    np.testing.assert_allclose(line.get_ydata(), values)
    np.testing.assert_array_equal(np.round(line.get_xdata()), [0, 1, 2])
  alone = plotting.plot_rank({"softmax": residuals["softmax"]})
  np.testing.assert_array_equal(line_of(alone, "softmax").get_xdata(), [0, 1, 2])


@pytest.mark.parametrize(
  ("function", "name"),
  [
    (plotting.plot_plans, "plans"),
    (plotting.plot_sinks, "plans"),
    (plotting.plot_clouds, "clouds"),
    (plotting.plot_curves, "curves"),
    (plotting.plot_rank, "residuals"),
    (lambda empty: plotting.plot_dual(np.ones(3), empty), "predictions"),
  ],
)
def test_nothing_to_draw_is_refused(function, name):
  with pytest.raises(ValueError, match=f"{name} is empty: expected at least one"):
    function({})


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_figures_without_panels_are_refused(name):
  with pytest.raises(ValueError, match=f"{name}=0: expected at least 1"):
    plotting.subplots(**{name: 0})


def test_panels_are_counted_and_options_passed_on():
  panels = plotting.subplots(2, 3, width=2.0, height=1.5, sharey=True)
  assert panels.shape == (2, 3)
  np.testing.assert_array_equal(panels[0, 0].figure.get_size_inches(), [6.0, 3.0])
  panels[0, 0].set_ylim(0, 7)
  assert panels[1, 2].get_ylim() == (0, 7)


def test_new_figures_show_themselves_in_notebooks():
  image = plotting.plot_plan(PLANS[0]).figure._repr_png_()
  assert image.startswith(b"\x89PNG")
  assert len(image) > 1_000


def test_a_title_that_stands_out_is_saved_whole(tmp_path):
  axes = plotting.subplots()[0, 0]

  def height(name):
    axes.figure.savefig(tmp_path / name, dpi=50)
    return imread(tmp_path / name).shape[0]

  before = height("before.png")
  axes.set_title("several\nlines\nabove", y=1.5)
  assert height("after.png") > before + 20


def test_pyplot_and_its_settings_are_left_alone():
  code = """
import matplotlib.pyplot as plt, numpy as np
before = dict(plt.rcParams)
import asap_jax
from asap_jax import plotting
plotting.plot_plans({"a": np.eye(3)})[0, 0].figure._repr_png_()
plotting.plot_sinks({"a": np.eye(3)})
plotting.plot_rank({"a": [1.0, 0.5]})
plotting.plot_coupling(np.ones(3), np.ones(3), np.eye(3))
plotting.plot_dual(np.arange(3.0), {"a": np.arange(3.0)})
assert asap_jax.plotting.plot_plan is plotting.plot_plan
assert not plt.get_fignums()
assert before == dict(plt.rcParams)
"""
  command = [sys.executable, "-W", "ignore", "-c", code]
  found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
