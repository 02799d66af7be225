"""What matches keypoints: exact, cut short, compiled, learned in the loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import asap_jax
from asap_jax import Recipe
from asap_jax.matching import (
  AmortizedMatching,
  OptimalMatching,
  asap_matching,
  matching_call,
  matching_problem,
  sinkhorn_matching,
)
from experiments.matching.pair import Pair

# Log plans of descriptors of both sides.
Method = Callable[[jax.Array, jax.Array], jax.Array]
TEACHER = 100
# Closures of compiled matchings, and how close the best one has to be to the teacher.
COMPILED, TARGET = (1, 2), 0.02
# Without slices in use: sorting a thousand points takes as long as a closure.
_MAP: dict[str, Any] = {
  "slices": 1,
  "features": ("query", "cumulants", "gaussian"),
  "hidden": 0,
}
CUTS = {"zero": (1, 3, 5, 10), "gaussian": (1, 3, 5, 10), "dustbin": (1, 2, 3)}


class Draws(NamedTuple):
  """Several draws of keypoints.

  Attributes:
    query: descriptors of the left image, `[draws, n, 128]`.
    key: likewise of the right one.
    targets: see `Pair`, `[draws, n + 1, m + 1]`.
    same: likewise, `[draws, n, m]`.
  """

  query: jax.Array
  key: jax.Array
  targets: np.ndarray
  same: np.ndarray


def draws_of(pair: Pair, points: int, count: int, seed: int) -> Draws:
  """Draws of so many keypoints of each image."""
  random = np.random.default_rng(seed)
  drawn = [pair.drawn(points, random) for _ in range(count)]
  return Draws(
    jnp.asarray(np.stack([each.left.descriptors for each in drawn])),
    jnp.asarray(np.stack([each.right.descriptors for each in drawn])),
    np.stack([each.targets for each in drawn]),
    np.stack([each.same for each in drawn]),
  )


def learned(draws: Draws, steps: int) -> dict[str, Any]:
  """Temperature and dustbin that make the known pairs most likely."""
  layer = OptimalMatching(0.05, 20.0)

  def loss(layer: OptimalMatching, query, key, targets):
    return -(layer(query, key) * targets).sum() / targets.sum()

  # Logits are tens where the logarithm of the temperature is one.
  rates = {"dustbin": 0.5, "log_temperature": 0.05}
  rules = optax.partition(
    {name: optax.adam(rate) for name, rate in rates.items()}, _names
  )
  optimizer = nnx.Optimizer(layer, rules, wrt=nnx.Param)

  @nnx.jit
  def step(layer, optimizer, *batch):
    optimizer.update(layer, nnx.grad(loss)(layer, *batch))

  for i in range(steps):
    some = np.arange(2 * i, 2 * i + 2) % len(draws.query)
    step(layer, optimizer, draws.query[some], draws.key[some], draws.targets[some])
  temperature = float(jnp.exp(layer.log_temperature[...]))
  return {"temperature": temperature, "dustbin": float(layer.dustbin[...])}


def _names(parameters: Any) -> Any:
  return jax.tree.map_with_path(lambda path, _: path[0].key, parameters)


def plain_methods(options: dict[str, Any]) -> dict[str, Method]:
  """The teacher, its fastest form, and fewer iterations from each start."""
  run = functools.partial(sinkhorn_matching, **options)
  methods: dict[str, Method] = {
    "teacher": functools.partial(
      run, iterations=TEACHER, start="zero", implementation="ott"
    ),
    "exact": functools.partial(run, iterations=TEACHER, start="zero"),
  }
  for start, counts in CUTS.items():
    methods |= {
      f"{start}@{k}": functools.partial(run, iterations=k, start=start) for k in counts
    }
  return methods


def learned_methods(
  draws: Draws, options: dict[str, Any], steps: int, progress: bool
) -> dict[str, Method]:
  """Operators that are fitted to the plans of some draws, and a map that descends."""
  problems = matching_problem(draws.query, draws.key, **options)
  calls = [
    matching_call(jax.tree.map(lambda x, i=i: x[i : i + 2], problems))
    for i in range(0, len(draws.query), 2)
  ]
  fit = functools.partial(
    asap_jax.fit, calls, iterations=TEACHER, scale=1.0, progress=progress
  )
  made = {
    f"asap@{k}": fit(Recipe(closures=k, refine_steps=steps, **_MAP)) for k in COMPILED
  }
  made["best"] = fit(None, target_tv=TARGET)
  print(f"The best within TV {TARGET}: {made['best'].report.chosen}")
  methods: dict[str, Method] = {
    name: functools.partial(
      asap_matching, operator=fitted.attention_fn.operator, **options
    )
    for name, fitted in made.items()
  }
  return methods | {"amortized": amortized(draws, options, steps)}


def amortized(draws: Draws, options: dict[str, Any], steps: int) -> Method:
  """A map that has learned on its own loss, of no teacher."""
  layer = AmortizedMatching(draws.query.shape[-1], **options)
  optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=asap_jax.DualParam)

  def loss(layer: AmortizedMatching, query, key):
    layer(query, key)
    return asap_jax.dual_loss(layer)

  @nnx.jit
  def step(layer, optimizer, query, key):
    wanted = nnx.DiffState(0, asap_jax.DualParam)
    optimizer.update(layer, nnx.grad(loss, argnums=wanted)(layer, query, key))

  for i in range(steps):
    some = np.arange(2 * i, 2 * i + 2) % len(draws.query)
    step(layer, optimizer, draws.query[some], draws.key[some])
  layer.eval()
  return layer
