"""Claims of the peers' papers, against measurements of `experiments.peers`.

Statements are in our words, and of the papers' abstracts. All are judged on one small
task: what fails here may hold on theirs. Thresholds are the constants below.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Largest mean error of row sums and of column sums, relative to what they should be.
DOUBLY_STOCHASTIC = 1e-2
# Most that the most attended key may receive, in equal shares of the attention.
BALANCED = 1.5
# Standard errors of the difference of accuracies, seeds paired, that it must exceed.
STANDARD_ERRORS = 2.0
# Accuracy that may be lost where a paper says that it is kept.
KEPT = 0.01
# Of ASAP over its trained teacher.
SPEEDUP = 5.3

Row = Mapping[str, Any]
# The measurement in words, and whether the claim holds; `None` if it cannot be told.
Judgement = tuple[str, bool | None]


class Claim(NamedTuple):
  """A statement about a method, and how it is judged from its row and all rows."""

  source: str
  statement: str
  judge: Callable[[Row, Mapping[str, Row]], Judgement]


class Verdict(NamedTuple):
  """A claim after measuring; `reproduced` is `None` if that cannot be told."""

  method: str
  source: str
  statement: str
  measured: str
  reproduced: bool | None

  def __str__(self) -> str:
    answer = {True: "reproduced", False: "NOT reproduced", None: "not decided"}
    return (
      f"{self.method}: {self.statement} ({self.source})\n"
      f"  measured: {self.measured}: {answer[self.reproduced]}"
    )


def doubly_stochastic(row: Row, rows: Mapping[str, Row]) -> Judgement:
  """Whether mean errors of rows and columns are within `DOUBLY_STOCHASTIC`."""
  errors = row["row_error"], row["column_error"]
  measured = f"mean error of rows {errors[0]:.1e}, of columns {errors[1]:.1e}"
  return measured, max(errors) <= DOUBLY_STOCHASTIC


def balanced(row: Row, rows: Mapping[str, Row]) -> Judgement:
  """Whether the most attended key receives `BALANCED` equal shares at most."""
  shares = row["attention_sink_share"] * row["length"]
  measured = f"the most attended key receives {shares:.2f} equal shares"
  return measured, shares <= BALANCED


def over_concentrated(row: Row, rows: Mapping[str, Row]) -> Judgement:
  """Whether it receives more than that."""
  measured, holds = balanced(row, rows)
  return measured, not holds


def more_accurate(row: Row, rows: Mapping[str, Row], *, than: str) -> Judgement:
  """Whether accuracy is higher by more than `STANDARD_ERRORS`, seeds paired."""
  differences = _differences(row, rows, than)
  if not len(differences):
    return _missing(than)
  measured = f"{differences.mean():+.4f} to {than}"
  if len(differences) < 2:
    return f"{measured}, one seed", None
  error = differences.std(ddof=1) / math.sqrt(len(differences))
  measured = f"{measured}, standard error {error:.4f} ({len(differences)} seeds)"
  return measured, bool(differences.mean() > STANDARD_ERRORS * error)


def as_accurate(row: Row, rows: Mapping[str, Row], *, as_: str) -> Judgement:
  """Whether at most `KEPT` of the accuracy is lost, in the mean over seeds."""
  differences = _differences(row, rows, as_)
  if not len(differences):
    return _missing(as_)
  return f"{differences.mean():+.4f} to {as_}", bool(differences.mean() >= -KEPT)


def faster(
  row: Row, rows: Mapping[str, Row], *, than: Sequence[str], times: float = 1.0
) -> Judgement:
  """Whether a forward pass takes less time than all others, by a factor.

  The slow quartile of the one against the fast quartile of the other.
  """
  others = [name for name in than if name in rows]
  if not others:
    return _missing(" or ".join(than))
  ratios = {name: rows[name]["milliseconds"] / row["milliseconds"] for name in others}
  found = ", ".join(f"{ratio:.2f} times as fast as {n}" for n, ratio in ratios.items())
  slow = row["quartiles"][1]
  holds = all(times * slow < rows[name]["quartiles"][0] for name in others)
  return f"{found} (forward pass of the whole model)", holds


def _differences(row: Row, rows: Mapping[str, Row], other: str) -> np.ndarray:
  """Of accuracies, seed by seed, where both have one."""
  if other not in rows:
    return np.empty(0)
  pairs = zip(row["accuracies"], rows[other]["accuracies"], strict=True)
  return np.array([one - two for one, two in pairs if None not in (one, two)])


def _missing(name: str) -> Judgement:
  return f"{name} was not measured", None


_BEATS_SOFTMAX = functools.partial(more_accurate, than="softmax")
# In the log domain as it is trained, and in its fastest form.
_BEATS_SINKHORN = functools.partial(faster, than=("sinkhorn", "sinkhorn_scaling"))
_SANDER = "Sander et al., 2022, arXiv 2110.11773"
_ESP = "Shahbazi et al., 2025, arXiv 2502.07962"
_LOT = "Shahbazi et al., 2025, arXiv 2509.23436"
_SWGG = "Mahey et al., 2023, arXiv 2307.01770"
_EST = "Liu et al., 2025, arXiv 2410.12176"
_ASAP = "Tran, Milkert and Hyde, 2026, arXiv 2605.12879"

_OF_SINKHORN = (
  Claim(_SANDER, "attention becomes doubly stochastic", doubly_stochastic),
  Claim(_SANDER, "it raises accuracy over softmax", _BEATS_SOFTMAX),
)
CLAIMS: dict[str, tuple[Claim, ...]] = {
  "softmax": (Claim(_ESP, "softmax concentrates on few tokens", over_concentrated),),
  "sinkhorn": _OF_SINKHORN,
  "sinkformer": _OF_SINKHORN,
  "esp": (
    Claim(_ESP, "doubly stochastic without Sinkhorn's iterations", doubly_stochastic),
    Claim(_ESP, "attention is balanced over tokens", balanced),
    Claim(_ESP, "cheaper than Sinkhorn's iterations", _BEATS_SINKHORN),
    Claim(_ESP, "it raises accuracy over softmax", _BEATS_SOFTMAX),
  ),
  "lot": (
    Claim(_LOT, "provably doubly stochastic", doubly_stochastic),
    Claim(_LOT, "attention is balanced over tokens", balanced),
    Claim(_LOT, "less overhead than other doubly stochastic forms", _BEATS_SINKHORN),
    Claim(
      _LOT,
      "much accuracy for its cost (here: that of softmax is kept)",
      functools.partial(as_accurate, as_="softmax"),
    ),
  ),
  "differential": (
    Claim(
      "Ye et al., 2024, arXiv 2410.05258",
      "a better Transformer than with softmax (there: language models)",
      _BEATS_SOFTMAX,
    ),
  ),
  "swgg": (
    Claim(_SWGG, "a transport plan from one slice", doubly_stochastic),
    Claim(
      _SWGG,
      "as complex as sliced transport (here: cheaper than Sinkhorn's iterations)",
      _BEATS_SINKHORN,
    ),
  ),
  "est": (
    Claim(_EST, "a transport plan from all slices", doubly_stochastic),
    Claim(
      _EST,
      "with the efficiency of slices (here: cheaper than Sinkhorn's iterations)",
      _BEATS_SINKHORN,
    ),
  ),
  "asap": (
    Claim(
      _ASAP,
      f"{SPEEDUP} times as fast as the trained teacher (there: one frozen layer)",
      functools.partial(faster, than=("sinkhorn",), times=SPEEDUP),
    ),
    Claim(
      _ASAP,
      "most of the teacher's accuracy without retraining",
      functools.partial(as_accurate, as_="sinkhorn"),
    ),
  ),
}


def judge(rows: Sequence[Row]) -> list[Verdict]:
  """Every claim on a method that has a row, in the order of the rows."""
  by_method = {row["method"]: row for row in rows}
  return [
    Verdict(name, claim.source, claim.statement, *claim.judge(row, by_method))
    for name, row in by_method.items()
    for claim in CLAIMS.get(name, ())
  ]
