"""Match keypoints of a stereo pair: exact, cut short, and compiled.

python -m experiments.matching --out DIR
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asap_jax.matching import matches
from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.results import options_of, print_end, print_rows, write_results
from experiments.common.timing import Laps, time_interleaved
from experiments.matching.methods import (
  Draws,
  Method,
  draws_of,
  learned,
  learned_methods,
  plain_methods,
)
from experiments.matching.pair import Pair, load_pair

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add_seed(parser)
  add = parser.add_argument
  add("--points", type=whole(16), default=512, help="of each image in a draw")
  add("--fitted", type=whole(4), default=20, help="draws of the upper half")
  add("--tests", type=whole(1), default=10, help="draws of the lower half")
  add("--steps", type=whole(1), default=300, help="of learning, each time")
  add("--sizes", type=whole(16), nargs="+", default=[512, 1024, 2048], help="timed")
  add("--repeats", type=whole(3), default=15, help="of timing")
  args = parser.parse_args(arguments)
  if args.fitted % 2:
    parser.error(f"argument --fitted: {args.fitted}: expected an even number")
  try:
    pair = load_pair()
  except ImportError as error:
    parser.error(f"{error}; pip install -e '.[experiments]'")
  most = min(len(pair.left.positions), len(pair.right.positions))
  halves = [pair.half(lower) for lower in (False, True)]
  of_half = min(len(side.positions) for half in halves for side in half[:2])
  if args.points > of_half or max(args.sizes) > most:
    parser.error(
      f"the images have {most} keypoints, a half {of_half}: expected --points and "
      "--sizes of no more"
    )
  laps = Laps()
  fitted = draws_of(halves[0], args.points, args.fitted, args.seed)
  tested = draws_of(halves[1], args.points, args.tests, args.seed + 1)
  options = learned(fitted, args.steps)
  laps.end("learn")
  methods = plain_methods(options)
  threshold = chosen_threshold(methods["exact"], fitted)
  print(f"{options}, threshold {threshold}")
  methods |= learned_methods(fitted, options, args.steps, progress=False)
  laps.end("fit")
  rows = evaluated(methods, tested, threshold)
  laps.end("evaluate")
  for size in args.sizes:
    times = milliseconds(methods, pair, size, args.repeats, args.seed)
    for row in rows:
      row[f"milliseconds_{size}"] = times[row["method"]]
  laps.end("time")
  config = options_of(args) | options | {"threshold": threshold}
  path = write_results(args.out, "matching", config, rows, laps.seconds)
  print_rows(rows, f"{args.points} keypoints of each image, {args.tests} draws")
  print_end(laps.seconds, path)


def chosen_threshold(method: Method, draws: Draws) -> float:
  """The least confidence of a match for which F1 is best on what was learned from."""
  log_plans = jax.jit(method)(draws.query, draws.key)
  return max(THRESHOLDS, key=lambda each: scores(log_plans, draws.same, each)["f1"])


def evaluated(
  methods: Mapping[str, Method], draws: Draws, threshold: float
) -> list[dict[str, Any]]:
  """A row per method: how right its matches are, and how near its plans.

  `tv` is the share of all mass that lies elsewhere than in the teacher's plan, which
  is the first method's.
  """
  reference = None
  rows = []
  for name, method in methods.items():
    log_plans = jax.jit(method)(draws.query, draws.key)
    plans = np.exp(np.asarray(log_plans, np.float64))
    reference = plans if reference is None else reference
    apart = np.abs(plans - reference).sum((1, 2)) / reference.sum((1, 2))
    rows.append(
      {
        "method": name,
        **scores(log_plans, draws.same, threshold),
        "column_error": float(column_errors(plans).mean()),
        "tv": float(0.5 * apart.mean()),
      }
    )
  return rows


def column_errors(plans: np.ndarray) -> np.ndarray:
  """Relative errors of the columns of plans, dustbins included."""
  wanted = np.ones(plans.shape[-1])
  wanted[-1] = plans.shape[-2] - 1
  return np.abs(plans.sum(-2) / wanted - 1.0)


def scores(
  log_plans: jax.Array, same: np.ndarray, threshold: float
) -> dict[str, float]:
  """Precision, recall and F1 of the matches of all draws together.

  A match is right if its keypoints are one; a keypoint without a known partner has no
  right match. Recall is the share of keypoints with a partner whose match is right.
  """
  found = np.asarray(matches(jnp.asarray(log_plans), threshold).key)
  has_match = found >= 0
  right = np.take_along_axis(same, np.maximum(found, 0)[..., None], -1)[..., 0]
  count = int((right & has_match).sum())
  precision = count / max(int(has_match.sum()), 1)
  recall = count / max(int(same.any(-1).sum()), 1)
  f1 = 2 * precision * recall / max(precision + recall, 1e-9)
  return {"precision": precision, "recall": recall, "f1": f1}


def milliseconds(
  methods: Mapping[str, Method], pair: Pair, size: int, repeats: int, seed: int
) -> dict[str, float]:
  """Median times of a call, from descriptors of one pair to the plan."""
  draws = draws_of(pair, size, 1, seed)
  query, key = draws.query[0], draws.key[0]
  calls = {
    name: functools.partial(jax.jit(method), query, key)
    for name, method in methods.items()
  }
  times = time_interleaved(calls, repeats, seed)
  return {name: each.median for name, each in times.items()}


if __name__ == "__main__":
  main()
