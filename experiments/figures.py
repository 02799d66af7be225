"""Draw the method in one figure, from a small teacher trained on digits.

python -m experiments.figures --out DIR [--seed N]
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import asap_jax
from asap_jax import metrics, plotting
from asap_jax.plotting import series_style
from asap_jax.potentials.directions import normalise
from experiments.common.arguments import add_seed, parser_for, whole
from experiments.common.digits import batches_of, digits, shift_digits
from experiments.common.models import Encoder, EncoderConfig
from experiments.common.replacements import layers_of
from experiments.common.train import TrainConfig, train_classifier

ITERATIONS, SLICES, INPUTS = 20, 4, 64
MODEL = EncoderConfig(length=64, token_size=1, classes=10)


class Pieces(NamedTuple):
  """One head on one input, through the steps of the compiled layer.

  Attributes:
    query: `[n, dim]`.
    key: `[n, dim]`.
    directions: `[slices, dim]`, unit length.
    x: projected queries `[slices, n]`.
    y: projected keys `[slices, n]`.
    phi: their potentials `[slices, n]`, centred.
    weights: of the potentials, `[slices]`.
    dual: Sinkhorn's, that its last iteration starts from, `[inputs, n]`.
    predicted: by the dual map, `[inputs, n]`.
    plan: closed once, `[n, n]`.
    tv: total variation of the plans of this head to the teacher's, over all inputs.
  """

  query: np.ndarray
  key: np.ndarray
  directions: np.ndarray
  x: np.ndarray
  y: np.ndarray
  phi: np.ndarray
  weights: np.ndarray
  dual: np.ndarray
  predicted: np.ndarray
  plan: np.ndarray
  tv: float


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add_seed(parser)
  parser.add_argument("--steps", type=whole(1), default=300, help="training steps")
  parser.add_argument("--refine-steps", type=whole(0), default=200)
  args = parser.parse_args(arguments)
  pieces = compute(args.seed, args.steps, args.refine_steps)
  args.out.mkdir(parents=True, exist_ok=True)
  draw(pieces).savefig(args.out / "method.png", dpi=160)
  print(f"Wrote {args.out / 'method.png'}")


def compute(seed: int, steps: int, refine_steps: int) -> Pieces:
  """Trains, compiles with potentials alone, and takes the head they change most.

  That is where one Sinkhorn iteration from zero errs most, over all inputs.
  """
  data = digits(seed)
  sinkhorn = functools.partial(asap_jax.sinkhorn_attention, iterations=ITERATIONS)
  teacher = Encoder(MODEL, sinkhorn, nnx.Rngs(seed))
  train_classifier(
    teacher, data.train, TrainConfig(steps), seed, "Training", shift_digits
  )
  compiled, _ = asap_jax.compile(
    teacher,
    batches_of(data.train.inputs, 64),
    asap_jax.Recipe(
      SLICES, features=("potentials",), hidden=0, refine_steps=refine_steps
    ),
    seed=seed,
  )
  found = []
  for layer in layers_of(teacher, {"asap": compiled}, data.test.inputs[:INPUTS]):
    (activation,), dual_map = layer.calls, layer.held["asap"].dual_map
    tokens, logits = (activation.query, activation.key), activation.logits
    dual = asap_jax.teacher.sinkhorn_source_dual(logits, ITERATIONS)
    predicted = asap_jax.predict_dual(dual_map, *tokens)
    teacher_plan, plan, cut = (
      asap_jax.plan(logits, asap_jax.closure(logits, f))
      for f in (dual, predicted, jnp.zeros_like(dual))
    )
    missed = metrics.total_variation(cut, teacher_plan).mean(-1)
    tv = metrics.total_variation(plan, teacher_plan).mean((0, 2))
    for head in range(logits.shape[1]):
      directions = normalise(dual_map.directions[head])
      at = int(missed[:, head].argmax())
      query, key = (side[at, head] for side in tokens)
      potentials, x = asap_jax.sliced_potentials(query, key, directions)
      phi = potentials.phi - potentials.phi.mean(-1, keepdims=True)
      pieces = Pieces(
        query=np.asarray(query),
        key=np.asarray(key),
        directions=np.asarray(directions),
        x=np.asarray(x),
        y=np.asarray(directions @ key.T),
        phi=np.asarray(phi),
        weights=np.asarray(dual_map.weights[head]),
        dual=np.asarray(dual[:, head]),
        predicted=np.asarray(predicted[:, head]),
        plan=np.asarray(plan[at, head]),
        tv=float(tv[head]),
      )
      found.append((float(missed[:, head].mean()), pieces))
  return max(found, key=lambda each: each[0])[1]


def draw(pieces: Pieces) -> Figure:
  """Six panels: from queries and keys to a plan with unit rows and columns."""
  axes = plotting.subplots(2, 3, width=3.1, height=2.8)
  _draw_tokens(pieces, axes[0, 0])
  _draw_slices(pieces, axes[0, 1])
  _draw_potentials(pieces, axes[0, 2])
  _draw_weights(pieces, axes[1, 0])
  plotting.plot_dual(pieces.dual, {f"{INPUTS} inputs": pieces.predicted}, axes[1, 1])
  axes[1, 1].legend(loc="lower right", fontsize="small")
  axes[1, 1].set(xlabel="Sinkhorn's dual $f$", ylabel=r"prediction $\hat f$")
  _draw_plan(pieces, axes[1, 2])
  titles = (
    "1  queries and keys",
    "2  on learned slices",
    "3  1-D potentials, exact",
    "4  learned map",
    "5  predicted dual",
    "6  one closure: the plan",
  )
  for panel, title in zip(axes.flat, titles, strict=True):
    panel.set_title(title, fontsize=11, fontweight="bold", loc="left")
  return axes[0, 0].figure


def _draw_tokens(pieces: Pieces, axes: Axes) -> None:
  """In the plane of the two leading axes, with the slices as they lie in it."""
  both = np.concatenate([pieces.query, pieces.key])
  _, _, rotation = np.linalg.svd(both - both.mean(0), full_matrices=False)
  plane = rotation[:2].T
  clouds = {"queries": pieces.query @ plane, "keys": pieces.key @ plane}
  plotting.plot_clouds(clouds, axes)
  centre = both.mean(0) @ plane
  reach = 0.9 * np.abs(both @ plane - centre).max()
  for direction in pieces.directions @ plane:
    end = centre + reach * direction
    axes.annotate("", end, centre, arrowprops={"arrowstyle": "->", "color": "#d55e00"})
  axes.legend(loc="upper right", fontsize="small", borderpad=0.2)
  axes.set(aspect="auto", xticks=[], yticks=[], xlabel="arrows: slices, in this plane")


def _draw_slices(pieces: Pieces, axes: Axes) -> None:
  """Queries above, keys below, joined as the optimal coupling on the line has them."""
  for index, (x, y) in enumerate(zip(pieces.x, pieces.y, strict=True)):
    low = -1.6 * index
    for points, height, style in (
      (x, low + 1.0, series_style(0)),
      (y, low, series_style(1)),
    ):
      marks = style | {"linestyle": "", "markersize": 3.5}
      axes.plot(points, np.full_like(points, height), **marks)
    ends = np.stack([np.sort(x), np.sort(y)])
    axes.plot(ends, [low + 1.0, low], color="grey", linewidth=0.5, zorder=0)
  heights = [0.5 - 1.6 * index for index in range(len(pieces.x))]
  axes.set_yticks(heights, [f"{index + 1}" for index in range(len(pieces.x))])
  axes.set(xticks=[], xlabel="position on the line", ylabel="slice")


def _draw_potentials(pieces: Pieces, axes: Axes) -> None:
  curves = {}
  for index, (x, phi) in enumerate(zip(pieces.x, pieces.phi, strict=True)):
    order = np.argsort(x)
    curves[f"slice {index + 1}"] = x[order], phi[order]
  labels = {"xlabel": "projected query", "ylabel": r"potential $\phi$"}
  plotting.plot_curves(curves, axes, **labels)
  axes.set(xticks=[], yticks=[])


def _draw_weights(pieces: Pieces, axes: Axes) -> None:
  names = [f"$w_{index + 1}$" for index in range(len(pieces.weights))]
  axes.bar(names, pieces.weights, color="#0072b2")
  axes.axhline(0.0, color="black", linewidth=1.0)
  axes.set(ylabel="weight of the potential")
  axes.set_xlabel(r"$\hat f_i = \sum_l\, w_l\, \phi_l(i)$", fontsize=12)


def _draw_plan(pieces: Pieces, axes: Axes) -> None:
  """With what queries send on the right and what keys receive below."""
  maximum = float(np.quantile(pieces.plan, 0.995))
  plotting.plot_plan(pieces.plan, axes, maximum=maximum)
  axes.set(xlabel="")
  below = axes.inset_axes((0.0, -0.28, 1.0, 0.2))
  plotting.plot_column_sums(pieces.plan, below)
  below.set(xlabel="keys: column sums", ylim=(0, 2), yticks=[0, 1])
  right = axes.inset_axes((1.08, 0.0, 0.2, 1.0))
  sums = pieces.plan.sum(1)
  right.barh(np.arange(len(sums)), sums, height=1.0, color="#0072b2")
  right.axvline(1.0, color="black", linewidth=1.0, linestyle="--")
  right.set(xlim=(0, 2), xticks=[0, 1], yticks=[], xlabel="row sums")
  right.set_ylim(len(sums) - 0.5, -0.5)


if __name__ == "__main__":
  main()
