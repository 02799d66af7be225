"""Code that the README shows runs."""

import functools

from helpers.pages import ROOT, figures, run_examples

import asap_jax
from asap_jax.compiler import measuring as measure

README = ROOT / "README.md"


def test_the_example_runs_and_prints_its_report(capsys, monkeypatch):
  # As it stands, but for how long the maps are refined, and how many cuts of Sinkhorn
  # are compiled beside them.
  few = functools.partial(asap_jax.compile, refine_steps=20)
  monkeypatch.setattr(asap_jax, "compile", few)
  monkeypatch.setattr(measure, "CUTS", (1,))
  names = run_examples(README)
  assert names["outputs"].shape == (16, 64, 32)
  assert "column error" in capsys.readouterr().out


def test_figures_are_there():
  assert figures(README)
  for figure in figures(README):
    assert figure.is_file(), figure
