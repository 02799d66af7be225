"""Claims are judged by their thresholds."""

import pytest

from experiments.peers import __main__ as peers
from experiments.peers import claims
from experiments.peers.display import draw


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
  assert set(claims.CLAIMS) <= {*peers.ATTENTIONS, *peers.SLOW}


def test_only_a_claim_that_failed_says_what_that_is_due_to():
  rows = [row_of("softmax"), row_of("differential", accuracies=[0.99, 0.99, 0.99])]
  *_, better = claims.judge(rows)
  *_, worse = claims.judge([rows[0], row_of("differential")])
  *_, unknown = claims.judge([row_of("differential")])
  found = [verdict.reproduced for verdict in (better, worse, unknown)]
  assert found == [True, False, None]
  due = ["due to: size" in str(verdict) for verdict in (better, worse, unknown)]
  assert due == [False, True, False]


def test_figure_takes_more_methods_than_colours(tmp_path):
  cost = {"rank_residual": [0.9, 0.5], "accuracy": 0.9}
  rows = [row_of(name, **cost) for name in peers.ATTENTIONS]
  draw(rows, tmp_path / "peers.png")
  assert (tmp_path / "peers.png").stat().st_size > 10_000
