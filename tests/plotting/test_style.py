from asap_jax.plotting import series_style


def test_styles_of_many_series_differ():
  styles = {tuple(map(str, series_style(index).values())) for index in range(156)}
  assert len(styles) == 156
