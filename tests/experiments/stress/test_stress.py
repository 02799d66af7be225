"""The stress experiment: its oracle, what it draws, and a short run of all of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import asap_jax
from experiments.stress import calls, damage, drawn, exact, refused
from experiments.stress.__main__ import main, merged
from experiments.stress.entries import entries
from experiments.stress.entries_pure import pure
from experiments.stress.samples import Entry


def loop(logits, allowed, f, iterations):
  """Sinkhorn's iterations entry by entry, in the plain domain, in one block."""
  queries = [i for i in range(len(logits)) if allowed[i].any()]
  keys = [j for j in range(logits.shape[1]) if allowed[:, j].any()]
  plan = np.zeros_like(logits)
  for i in queries:
    for j in keys:
      plan[i, j] = np.exp(logits[i, j] + f[i])
  for _ in range(iterations):
    for j in keys:
      plan[:, j] *= len(queries) / len(keys) / plan[:, j].sum()
    for i in queries:
      plan[i] /= plan[i].sum()
  return plan


def test_plans_in_float64_are_those_of_a_loop():
  random = np.random.default_rng(0)
  logits, f = random.normal(size=(2, 1, 5, 4)), random.normal(size=(2, 1, 5))
  valid = random.random((2, 1, 5, 1)) < 0.8, random.random((2, 1, 1, 4)) < 0.8
  allowed = valid[0] & valid[1]
  masked = np.where(allowed, logits, -np.inf)
  plan = exact.sinkhorn_plan(masked, allowed, f, 3)
  for one in range(2):
    expected = loop(logits[one, 0], allowed[one, 0], f[one, 0], 3)
    np.testing.assert_allclose(plan[one, 0], expected, rtol=1e-12)


def test_blocks_are_the_plans_of_their_segments():
  random = np.random.default_rng(1)
  logits, f = random.normal(size=(6, 6)), np.zeros(6)
  ids = np.array([1, 1, 2, 2, 2, 0])
  allowed = (ids[:, None] == ids) & (ids > 0)[:, None]
  plan = exact.sinkhorn_plan(np.where(allowed, logits, -np.inf), allowed, f, 4)
  for number in (1, 2):
    own = np.ix_(ids == number, ids == number)
    expected = loop(logits[own], np.ones_like(logits[own], bool), f, 4)
    np.testing.assert_allclose(plan[own], expected, rtol=1e-12)
  assert (plan[~allowed] == 0).all()


def test_all_methods_and_masks_are_drawn():
  found = drawn.configs(100, 0)
  assert {(c.function, c.implementation, c.count) for c in found} == set(drawn.METHODS)
  for method in {c.method for c in found} - {"softmax"}:
    assert {c.mask for c in found if c.method == method} == set(drawn.MASKS), method
  assert any(c.batch == 0 for c in found)
  assert any(c.n == 1 for c in found)


def test_what_is_wrong_is_counted(monkeypatch):
  config = next(c for c in drawn.configs(40, 0) if c.mask == "padding" and c.n > 2)
  config = drawn.dataclasses.replace(config, function="softmax", batch=2)
  (right,) = calls.measured([config], 4, 0)
  assert (right["tried"], right["lost"]) == (4, 0)
  own = asap_jax.softmax_attention
  for name, wrong in (
    ("not_finite", lambda out: out * jnp.nan),
    ("rows_off", lambda out: out * 1.1),
    ("padding_not_zero", lambda out: out + 1.0),
    ("beyond_bound", lambda out: out[..., ::-1]),
  ):
    monkeypatch.setattr(
      asap_jax, "softmax_attention", lambda *a, wrong=wrong, **k: wrong(own(*a, **k))
    )
    (row,) = calls.measured([config], 4, 0)
    assert row[name] > 0, name
    assert row["lost"] >= row[name]


def test_damage_that_nobody_sees_is_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(damage, "number_at", lambda path: 2.0)
  rows = damage.damaged(tmp_path / "damage", 1, 0)
  assert all(row["lost"] == row["tried"] > 0 for row in rows)


def test_bad_arguments_are_refused_by_name(unchecked):
  for name, entry in pure().items():
    for argument, bad in entry.bad.items():
      for value in bad:
        assert refused.said_of(entry, argument, value) is None, (name, argument)


def test_what_is_not_refused_well_is_told():
  def raises(error):
    def call(size):
      raise error

    return Entry(call, {}, {})

  said = refused.said_of
  assert said(Entry(lambda size: size, {}, {}), "size", 1) == "taken"
  assert said(raises(TypeError("size")), "size", 1).startswith("TypeError")
  assert said(raises(ValueError("large")), "size", 1).startswith("a ValueError without")
  assert said(raises(ValueError("size=1")), "size", 1) is None


def test_every_public_name_that_can_be_called_is_tried():
  tried = {name.partition(",")[0] for name in entries()}
  # Of arrays and parameters alone.
  plain = {"AttentionCall", "Diagnosis", "DualParam", "Duals", "Potentials"}
  assert set(asap_jax.__all__) - tried == plain


def test_rows_of_a_method_are_one():
  one = {"method": "a", "tried": 1, "lost": 0, "worst_row": 0.5}
  other = {"method": "a", "tried": 2, "lost": 1, "worst_row": 0.25}
  assert merged([one, other]) == [
    {"method": "a", "tried": 3, "lost": 1, "worst_row": 0.5}
  ]


@pytest.mark.slow
def test_a_short_run_loses_nothing_and_is_resumed(tmp_path, unchecked, capsys):
  main(["--out", str(tmp_path), "--quick"])
  results = json.loads((tmp_path / "results.json").read_text())
  methods = {row["method"] for row in results["rows"]}
  assert {"killed, new", "bits flipped", "read meanwhile", "asap xla"} <= methods
  for row in results["rows"]:
    assert row["tried"] > 0
    assert (row["lost"], row.get("litter", 0)) == (0, 0), row
  capsys.readouterr()
  main(["--out", str(tmp_path), "--quick"])  # all is there
  assert "..." not in capsys.readouterr().out
  with pytest.raises(SystemExit):
    main(["--out", str(tmp_path), "--quick", "--seed", "1"])
  assert "other options" in capsys.readouterr().err
