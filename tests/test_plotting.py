import numpy as np
import pytest
from matplotlib.figure import Figure

from asap_jax.plotting import plot_column_sums, plot_plan


@pytest.fixture
def axes():
  return Figure().subplots()


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
