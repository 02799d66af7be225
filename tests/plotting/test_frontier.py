import numpy as np
import pytest
from matplotlib.figure import Figure

from asap_jax.compiler import Alternative, LayerReport, Report
from asap_jax.plotting import plot_frontier, plot_report, plot_scaling

CUTS = [Alternative(f"sinkhorn@{k}", 0.5 / k, 0.3 * k) for k in (1, 2, 5)]
MEASURED = (*CUTS, Alternative("asap@2", 0.02, 1.0))


@pytest.fixture
def axes():
  return Figure().subplots()


def line_of(axes, label):
  (line,) = (line for line in axes.lines if line.get_label() == label)
  return line


def texts(axes):
  return {text.get_text(): text.xy for text in axes.texts}


def test_frontier_joins_cuts_and_marks_the_others(axes):
  compiled = [Alternative("asap", 0.05, 0.7), Alternative("asap@2", 0.01, 0.9)]
  softmax = [Alternative("softmax", 0.8, 0.2)]
  series = {"cut": CUTS, "compiled": compiled, "softmax": softmax}
  assert plot_frontier(series, axes, "a title") is axes
  assert axes.get_title() == "a title"
  curve = line_of(axes, "cut")
  assert curve.get_linestyle() == "-"
  np.testing.assert_allclose(curve.get_xydata(), [(0.3, 0.5), (0.6, 0.25), (1.5, 0.1)])
  markers = [line_of(axes, name) for name in ("compiled", "softmax")]
  assert {line.get_linestyle() for line in markers} == {"None"}
  np.testing.assert_allclose(markers[0].get_xydata(), [(0.7, 0.05), (0.9, 0.01)])
  assert len({line.get_marker() for line in (curve, *markers)}) == 3
  assert texts(axes)["@5"] == (1.5, 0.1)
  assert texts(axes)["asap@2"] == (0.9, 0.01)
  assert [text.get_text() for text in axes.get_legend().texts] == list(series)
  assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0.0
  assert axes.get_xlim()[1] > 1.5


def test_frontier_makes_a_figure_of_its_own(tmp_path):
  axes = plot_frontier({"cut": CUTS})
  axes.figure.savefig(tmp_path / "frontier.png")
  assert (tmp_path / "frontier.png").stat().st_size > 5_000


def test_frontier_warns_about_points_that_are_not_finite(axes):
  bad = Alternative("asap", float("nan"), 1.0)
  with pytest.warns(UserWarning, match=r"compiled: \['asap'\] are not finite"):
    plot_frontier({"cut": CUTS, "compiled": [bad, CUTS[0]]}, axes)
  assert "asap" not in texts(axes)


@pytest.mark.parametrize("series", [{}, {"cut": []}])
def test_frontier_of_nothing_is_refused(series):
  with pytest.raises(ValueError, match="holds no points: expected a family"):
    plot_frontier(series)


def report_of(*chosen, alternatives=MEASURED):
  names = ("r2", "kl", "column_error", "teacher_column_error")
  figures = {name: np.full(2, 0.1) for name in names}
  layers = [
    LayerReport(
      name=f"layer {i}", iterations=20, tv=np.array([0.1, 0.3]), seconds=1.0,
      teacher_milliseconds=4.0 + i, milliseconds=0.5, chosen=label,
      alternatives=alternatives, **figures,
    )
    for i, label in enumerate(chosen)
  ]  # fmt: skip
  return Report(
    tuple(layers), model_milliseconds={"as trained": 9.0}, target_tv=None, seconds=3.0
  )


def test_report_has_a_panel_per_layer_and_rings_what_was_chosen():
  panels = plot_report(report_of("asap", "asap@2", "teacher", "sinkhorn@2"))
  assert [panel.get_title() for panel in panels] == [f"layer {i}" for i in range(4)]
  rings = [line_of(panel, "chosen").get_xydata()[0] for panel in panels]
  np.testing.assert_allclose(rings, [(0.5, 0.2), (1.0, 0.02), (6.0, 0.0), (0.6, 0.25)])
  for index, panel in enumerate(panels):
    curve = line_of(panel, "Sinkhorn cut short").get_xydata()
    np.testing.assert_allclose(curve[:, 0], [0.3, 0.6, 1.5, 4.0 + index])
    assert curve[-1, 1] == 0.0
    assert "asap@2" in texts(panel)
    assert ("asap" in texts(panel)) == (index == 0)
  assert len({panel.get_xlim() for panel in panels}) == 1
  assert panels[0].get_xlim()[1] > 7.0
  assert len(panels[0].figure.axes) == 4


def test_report_draws_on_axes_that_are_given(axes):
  assert list(plot_report(report_of("asap"), [axes])) == [axes]
  with pytest.raises(ValueError, match="holds 1 axes: expected 2, one for every layer"):
    plot_report(report_of("asap", "asap"), [axes])


def test_report_without_alternatives_is_refused():
  with pytest.raises(ValueError, match="holds no alternatives: expected some"):
    plot_report(report_of("asap", alternatives=()))


def test_scaling_is_log_log_with_families_and_variants_told_apart(axes):
  points = [(1024, 4.0), (64, 0.5)]
  series = {("a", "x"): points, ("a", "y"): points, ("b", "y"): points[:1]}
  assert plot_scaling(series, axes, "seconds", "a title") is axes
  assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
  assert (axes.get_ylabel(), axes.get_title()) == ("seconds", "a title")
  np.testing.assert_array_equal(axes.get_xticks(), [64, 1024])
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "1024"]
  first, second, third = (line_of(axes, name) for name in ("a, x", "a, y", "b, y"))
  np.testing.assert_array_equal(first.get_xydata(), [(64, 0.5), (1024, 4.0)])
  assert first.get_marker() == second.get_marker() != third.get_marker()
  assert first.get_color() == second.get_color() != third.get_color()
  assert first.get_linestyle() != second.get_linestyle() == third.get_linestyle()
  assert len(axes.get_legend().texts) == 3


def test_scaling_keeps_the_styles_of_a_family_without_points(axes):
  series = {("a", ""): [], ("b", ""): [(64, 1.0)]}
  plot_scaling(series, axes)
  plot_scaling({("a", ""): [(64, 1.0)], ("b", ""): [(64, 1.0)]}, axes)
  assert len({line.get_marker() for line in axes.lines if line.get_label() == "b"}) == 1


def test_scaling_tells_many_families_apart_and_makes_a_figure(tmp_path):
  series = {(f"f{i}", ""): [(64, i + 1.0), (128, i + 2.0)] for i in range(9)}
  axes = plot_scaling(series)
  styles = {(line.get_marker(), line.get_fillstyle()) for line in axes.lines}
  assert len(styles) == 9
  axes.figure.savefig(tmp_path / "scaling.png")
  assert (tmp_path / "scaling.png").stat().st_size > 5_000


def test_scaling_warns_about_points_that_have_no_logarithm(axes):
  with pytest.warns(UserWarning, match=r"a x: \[\(64, 0.0\)\] are not positive"):
    plot_scaling({("a", "x"): [(64, 0.0), (128, 1.0)]}, axes)
  np.testing.assert_array_equal(line_of(axes, "a, x").get_xydata(), [(128, 1.0)])


@pytest.mark.parametrize("series", [{}, {("a", "x"): []}])
def test_scaling_of_nothing_is_refused(series):
  with pytest.raises(ValueError, match="holds no points: expected one or more"):
    plot_scaling(series)
