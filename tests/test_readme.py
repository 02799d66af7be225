"""Code that the README shows runs."""

from helpers.pages import ROOT, figures, run_examples

from asap_jax.compiler import selection

README = ROOT / "README.md"


def test_the_example_runs_and_prints_its_report(capsys, monkeypatch):
  # As it stands, but for how many cuts of Sinkhorn and starts are compiled beside it.
  monkeypatch.setattr(selection, "CUTS", (1,))
  monkeypatch.setattr(selection, "STARTS", ())
  names = run_examples(README)
  assert names["outputs"].shape == (16, 64, 32)
  assert "column error" in capsys.readouterr().out


def test_figures_are_there():
  assert figures(README)
  for figure in figures(README):
    assert figure.is_file(), figure
