"""Teachers from files."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.pages import ROOT

from asap_jax.compiler.operators import Sinkhorn, Softmax, operator_of
from asap_jax.compiler.sites import find_sinkhorn, held_at
from experiments.common import replacements
from experiments.common.frozen_teachers import load_inputs, load_teacher

TEACHERS = ROOT.parent / "shared" / "teachers"


def test_files_of_another_kind_are_refused(files):
  with pytest.raises(ValueError, match="expected a teacher's weights"):
    load_teacher(files / "inputs.npz", heads=2)
  with pytest.raises(ValueError, match="heads=3: expected a divisor of the width 16"):
    load_teacher(files / "teacher.npz", heads=3)


@pytest.mark.slow
@pytest.mark.skipif(not TEACHERS.is_dir(), reason="the frozen teachers are not here")
@pytest.mark.parametrize("name", ["cifar10", "imdb"])
def test_forward_pass_is_the_reference(name):
  path = TEACHERS / "reference_forward.py"
  spec = importlib.util.spec_from_file_location("reference_forward", path)
  reference = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(reference)
  sizes = reference.SPECS[name]
  inputs = load_inputs(TEACHERS / f"{name}_inputs.npz", 2).test
  found = load_teacher(TEACHERS / f"{name}.npz", sizes["heads"])(jnp.asarray(inputs))
  scaled = inputs / np.float32(127.5) - 1.0 if name == "cifar10" else inputs
  expected, _ = reference.forward(
    reference.load(TEACHERS / f"{name}.npz"),
    jnp.asarray(scaled),
    reference.sinkhorn(20),
    **sizes,
  )
  np.testing.assert_allclose(found, expected, atol=2e-3)


def test_cuts_are_measured_in_their_fastest_form(files):
  teacher = load_teacher(files / "teacher.npz", heads=2)
  for given in (teacher, replacements.cut_sinkhorn(teacher, 5)):
    cut = replacements.cut_sinkhorn(given, 3)
    (site,) = find_sinkhorn(cut)
    assert operator_of(held_at(cut, site)) == Sinkhorn(3)
    swapped = replacements.softmax_swap(given)
    assert operator_of(held_at(swapped, site)) == Softmax()
    ids = load_inputs(files / "inputs.npz", 4).test
    assert np.isfinite(swapped(jnp.asarray(ids))).all()
