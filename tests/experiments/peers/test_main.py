"""Attentions by name, the comparison of peers on a few steps, and claims."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from asap_jax.peers import lambda_init
from experiments.common.attentions import TRAINABLE, build_attention
from experiments.common.digits import Split, digits
from experiments.common.models import Encoder, EncoderConfig
from experiments.peers import __main__ as peers
from experiments.peers import claims
from experiments.peers import measuring as peers_measure
from experiments.peers.display import displayed, draw

TINY = EncoderConfig(length=6, token_size=1, classes=3, width=8, heads=2, layers=2)
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.normal(size=(7, TINY.length, 1)).astype(np.float32)
LABELS = RANDOM.integers(3, size=7)


@pytest.mark.parametrize("name", [*TRAINABLE, "sinkhorn@2"])
def test_each_name_trains(name):
  model = peers.build(name, dataclasses.replace(TINY, layers=1), seed=0)

  @nnx.jit
  def slopes_of(model):
    def loss(model):
      scores = jax.nn.log_softmax(model(TOKENS))
      return -jnp.take_along_axis(scores, LABELS[:, None], axis=-1).mean()

    return nnx.grad(loss)(model)

  slopes = {
    "/".join(map(str, path)): float(jnp.abs(slope[...]).max())
    for path, slope in nnx.to_flat_state(slopes_of(model))
  }
  assert all(np.isfinite(slope) for slope in slopes.values())
  # Biases of keys cancel in row normalisations; a coupling chosen by sorting has no
  # slope in what it sorts.
  of_query = slopes["blocks/0/attention/query/kernel"]
  assert (of_query > 0) == (name != "swgg")
  learned = [slope for path, slope in slopes.items() if "attention_fn" in path]
  assert bool(learned) == (name in ("esp", "lot", "differential"))
  assert all(slope > 0 for slope in learned)
  assert slopes["blocks/0/attention/value/kernel"] > 0


def test_functions_are_shared_and_layers_counted_from_one():
  given = {"heads": 2, "dim": 4, "rngs": nnx.Rngs(0)}
  first, second = (
    [build_attention(name, layer=layer, **given) for name in ("est", "differential")]
    for layer in (1, 2)
  )
  assert first[0] is second[0]
  assert first[0].keywords == {"inverse_temperature": 1.0}
  for layer, (_, module) in enumerate((first, second), 1):
    assert dict(module.options) == {"initial": lambda_init(layer)}


def test_all_but_the_attention_starts_alike_under_one_seed():
  states = [
    {
      path: np.asarray(value[...])
      for path, value in nnx.to_flat_state(nnx.state(peers.build(name, TINY, seed)))
      if "attention_fn" not in path and isinstance(value, nnx.Param)
    }
    for name, seed in (("softmax", 0), ("lot", 0), ("softmax", 1))
  ]
  assert states[0].keys() == states[1].keys()
  for path in states[0]:
    np.testing.assert_array_equal(states[0][path], states[1][path])
  path = ("embed", "kernel")
  assert not np.array_equal(states[0][path], states[2][path])


def test_blocks_hold_the_attentions_of_a_sequence():
  def nothing(query, key, value, **given):
    return jnp.zeros_like(value)

  def values(query, key, value, **given):
    return value

  models = [
    Encoder(TINY, functions, nnx.Rngs(0))
    for functions in ([nothing, values], nothing, [nothing, nothing])
  ]
  (embedded, one, two), every, listed = (model.states(TOKENS) for model in models)
  np.testing.assert_array_equal(embedded, every[0])
  np.testing.assert_array_equal(one, every[1])
  assert np.abs(two - every[2]).max() > 1e-3
  np.testing.assert_array_equal(every[2], listed[2])
  with pytest.raises(ValueError, match="attention_fn has 3 functions: expected 2"):
    Encoder(TINY, [nothing] * 3, nnx.Rngs(0))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("sinkhron", r"name='sinkhron': expected one of .*did you mean 'sinkhorn'\?"),
    ("sinkhorn@0", r"name='sinkhorn@0': expected sinkhorn@k"),
    ("one_sided", r"name='one_sided': its dual map is calibrated .*softmax, sinkhorn"),
  ],
)
def test_names_that_cannot_be_trained_are_refused(name, message, tmp_path, capsys):
  with pytest.raises(ValueError, match=message):
    build_attention(name, heads=2, dim=4, layer=1, rngs=nnx.Rngs(0))
  with pytest.raises(SystemExit):
    peers.main(["--out", str(tmp_path / "new"), "--attentions", name])
  assert f"name='{name}'" in capsys.readouterr().err


def test_compiled_forms_need_their_teacher(tmp_path, capsys):
  with pytest.raises(SystemExit):
    peers.main(["--out", str(tmp_path / "new"), "--attentions", "softmax", "asap"])
  assert "asap is made of sinkhorn: name that too" in capsys.readouterr().err


def to_first_key(query, key, value, *, module=None, **given):
  """All queries attend to the first key, the first one twice."""
  weights = jnp.zeros((len(query), TINY.heads, TINY.length, TINY.length))
  weights = weights.at[..., 0].set(1.0).at[..., 0, 0].set(2.0)
  if module is not None:
    module.sow(nnx.Intermediate, "attention_weights", weights)
  return jnp.broadcast_to(value[:, :1], value.shape)


def test_plans_are_measured_as_they_are(monkeypatch):
  model = Encoder(TINY, to_first_key, nnx.Rngs(0))
  found = peers_measure.measure(model, Split(TOKENS, LABELS))
  n = TINY.length
  assert found["row_error"] == pytest.approx(1 / n)
  assert found["column_error"] == pytest.approx((n + n - 1) / n)
  assert found["attention_sink_share"] == pytest.approx(1.0)
  right = np.asarray(model(TOKENS)).argmax(-1) == LABELS
  assert found["accuracy"] == pytest.approx(right.mean())
  residuals = [np.mean([_residual(x) for x in s]) for s in model.states(TOKENS)]
  np.testing.assert_allclose(found["rank_residual"], residuals, rtol=1e-5)
  assert found["n_test"] == 7

  # Batches of unequal size count by their sizes.
  monkeypatch.setattr(peers_measure, "BATCH", 3)
  in_parts = peers_measure.measure(model, Split(TOKENS, LABELS))
  assert in_parts == {name: pytest.approx(value) for name, value in found.items()}


def _residual(tokens):
  """Of Dong et al., 2021, in float64."""
  tokens = np.asarray(tokens, np.float64)
  norms = [
    np.sqrt(np.linalg.norm(x, 1) * np.linalg.norm(x, np.inf))
    for x in (tokens - tokens.mean(0), tokens)
  ]
  return norms[0] / norms[1]


def test_seeds_are_pooled_and_those_that_failed_named():
  each = {"row_error": 0.1, "column_error": 0.2, "attention_sink_share": 0.5}
  each |= {"rank_residual": [1.0, 0.5], "n_test": 7, "accuracy": 0.5}
  other = each | {"accuracy": 0.8, "row_error": 0.3, "rank_residual": [0.0, 0.1]}
  row = peers_measure.pooled([each, None, other])
  assert row["accuracies"] == [0.5, None, 0.8]
  assert row["accuracy"] == pytest.approx(0.65)
  assert row["accuracy_std"] == pytest.approx(0.3 / 2**0.5)
  assert row["row_error"] == pytest.approx(0.2)
  assert row["rank_residual"] == pytest.approx([0.5, 0.3])
  assert "accuracy_std" not in peers_measure.pooled([each])


def row_of(method, **measured):
  return {
    "method": method,
    "accuracies": [0.90, 0.92, 0.94],
    "row_error": 1e-7,
    "column_error": 5e-3,
    "attention_sink_share": 1.2 / 64,
    "length": 64,
    "milliseconds": 10.0,
    "quartiles": [9.0, 11.0],
  } | measured


ROW = row_of("esp")


@pytest.mark.parametrize(
  ("judge", "changed", "others", "holds"),
  [
    (claims.doubly_stochastic, {}, {}, True),
    (claims.doubly_stochastic, {"column_error": 1.1e-2}, {}, False),
    (claims.doubly_stochastic, {"row_error": 1.1e-2}, {}, False),
    (claims.balanced, {}, {}, True),
    (claims.balanced, {"attention_sink_share": 1.6 / 64}, {}, False),
    (claims.over_concentrated, {"attention_sink_share": 1.6 / 64}, {}, True),
    # Always 0.02 more: no spread of the differences, however wide that of accuracies.
    ("more", {}, {"accuracies": [0.88, 0.90, 0.92]}, True),
    ("more", {}, {"accuracies": [0.92, 0.90, 0.92]}, False),
    ("more", {}, {"accuracies": [0.90, None, None]}, None),
    ("more", {}, None, None),
    ("as", {}, {"accuracies": [0.91, 0.92, 0.95]}, True),
    ("as", {}, {"accuracies": [0.92, 0.94, 0.96]}, False),
    ("faster", {}, {"milliseconds": 14.0, "quartiles": [12.0, 15.0]}, True),
    ("faster", {}, {"milliseconds": 14.0, "quartiles": [10.5, 15.0]}, False),
    ("twice", {}, {"milliseconds": 24.0, "quartiles": [23.0, 25.0]}, True),
    ("twice", {}, {"milliseconds": 24.0, "quartiles": [21.0, 25.0]}, False),
    ("faster", {}, None, None),
  ],
)
def test_claims_are_judged_by_their_thresholds(judge, changed, others, holds):
  other = {} if others is None else {"softmax": row_of("softmax", **others)}
  options = {
    "more": (claims.more_accurate, {"than": "softmax"}),
    "as": (claims.as_accurate, {"as_": "softmax"}),
    "faster": (claims.faster, {"than": ("softmax", "absent")}),
    "twice": (claims.faster, {"than": ("softmax",), "times": 2.0}),
  }
  function, given = options[judge] if isinstance(judge, str) else (judge, {})
  measured, found = function(ROW | changed, other, **given)
  assert found is holds
  assert measured


def test_claims_are_on_methods_that_were_measured():
  found = claims.judge([row_of("softmax"), row_of("esp", milliseconds=5.0)])
  assert {verdict.method for verdict in found} == {"softmax", "esp"}
  text = "\n".join(map(str, found))
  assert "cheaper than Sinkhorn's iterations" in text
  assert "sinkhorn or sinkhorn_scaling was not measured: not decided" in text
  assert set(claims.CLAIMS) <= set(peers.ATTENTIONS)


def test_figure_takes_more_methods_than_colours(tmp_path):
  cost = {"rank_residual": [0.9, 0.5], "accuracy": 0.9}
  rows = [row_of(name, **cost) for name in peers.ATTENTIONS]
  draw(rows, tmp_path / "peers.png")
  assert (tmp_path / "peers.png").stat().st_size > 10_000


def _small(monkeypatch):
  def few_digits(seed):
    data = digits(seed)
    parts = [type(part)(*(array[:128] for array in part)) for part in data[:2]]
    return type(data)(*parts, data.classes)

  small = dataclasses.replace(peers.MODEL, width=8)
  monkeypatch.setattr(peers, "digits", few_digits)
  monkeypatch.setattr(peers, "MODEL", small)


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path, monkeypatch, capsys):
  _small(monkeypatch)
  out, names = tmp_path / "out", ["softmax", "sinkhorn", "sinkhorn_scaling"]
  options = "--seeds 3 --steps 2 --layers 1 --attentions".split()
  peers.main(["--out", str(out), *options, *names])
  results = json.loads((out / "results.json").read_text())
  assert results["experiment"] == "peers"
  assert results["config"]["seeds"] == [3]
  assert results["config"]["width"] == 8
  rows = {row["method"]: row for row in results["rows"]}
  assert list(rows) == names
  for row in rows.values():
    assert row["row_error"] < 1e-5
    assert row["accuracies"] == [row["accuracy"]]
    assert row["quartiles"][0] <= row["milliseconds"] <= row["quartiles"][1]
    assert row["step_milliseconds"] > 0
    assert row["temp_bytes"] < row["step_temp_bytes"]
    assert len(row["rank_residual"]) == 2
    assert (row["n_test"], row["length"]) == (128, 64)
  assert rows["softmax"]["ratio_to_softmax"] == 1.0
  # The same plans, in another form.
  two = [rows[name] for name in names[1:]]
  assert two[0]["column_error"] < 1e-3 < rows["softmax"]["column_error"]
  assert two[0]["accuracy"] == two[1]["accuracy"]
  np.testing.assert_allclose(
    two[0]["rank_residual"], two[1]["rank_residual"], rtol=1e-4
  )
  printed = capsys.readouterr().out
  assert (out / "claims.txt").read_text() in printed
  assert "Wrote" in printed
  assert (out / "peers.png").stat().st_size > 10_000
  assert [row["method"] for row in displayed(results["rows"])] == names


def test_training_that_fails_leaves_its_seed_out(tmp_path, monkeypatch, capsys):
  def fails(*given):
    raise FloatingPointError("est, seed 0: training loss is nan after the last step")

  _small(monkeypatch)
  monkeypatch.setattr(peers, "train_classifier", fails)
  data = Split(TOKENS, LABELS)
  assert peers.trained(["est", "asap"], data, peers.MODEL, 0, 2) == {}
  assert "est, seed 0: training loss is nan" in capsys.readouterr().out
  assert peers.derived(["asap"], None, data, 0, 2) == {}


@pytest.mark.slow
def test_the_compiled_teacher_has_a_row(tmp_path, monkeypatch):
  _small(monkeypatch)
  names = ["sinkhorn", "asap"]
  rows = peers.run(tmp_path, names, seeds=[0], steps=2, layers=1, refine_steps=2)
  assert [row["method"] for row in rows] == names
  assert rows[1]["row_error"] < 1e-5
  assert rows[1]["column_error"] < 0.1
