"""Attention functions and their parts that `experiments.speed` compares, by name.

All of them take queries, keys and values `[batch, length, heads, dim]`, and a mask of
pairs of valid tokens or `None`.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

import asap_jax
from experiments.common.attentions import SLICES, build_attention
from experiments.speed.attentions import (
  blocked_softmax,
  heads_first,
  log_sinkhorn,
  training_step,
  unrolled_sinkhorn,
  valid_tokens,
)
from experiments.speed.problem import HIDDEN, Problem, random_dual_map

IMPLEMENTATIONS = ("xla", "chunked", "cudnn")


class Candidate(NamedTuple):
  """One implementation of one method.

  Attributes:
    method: as in results.json.
    implementation: as in results.json.
    function: of queries, keys, values and `arguments`, and `mask`.
    matrices: float32 matrices of all pairs of tokens that it holds at once, roughly.
    arguments: parameters.
    slices: of its dual map.
    unavailable: why it cannot run here, if it cannot.
  """

  method: str
  implementation: str
  function: Callable[..., Any]
  matrices: float
  arguments: tuple[Any, ...] = ()
  slices: int | None = None
  unavailable: str | None = None


def candidates(problem: Problem, methods: Sequence[str]) -> list[Candidate]:
  """All implementations of the methods named, those that cannot run here included.

  Raises:
    ValueError: if a name is unknown.
  """
  unknown = [name for name in methods if name not in METHODS]
  if unknown:
    raise ValueError(f"methods={unknown}: expected some of {tuple(METHODS)}")
  return [candidate for name in methods for candidate in METHODS[name](name, problem)]


def _softmax(name: str, problem: Problem) -> list[Candidate]:
  step = name == "softmax_step"
  wrap = training_step if step else lambda function: function
  dot_product = jax.nn.dot_product_attention
  fused = functools.partial(dot_product, implementation="cudnn")
  on_cpu = problem.device == "cpu"
  no_cache = None if on_cpu else "its blocks are for the cache of a CPU"
  # A step keeps the weights of all blocks for its gradient.
  blocks = 3 if step else 3 * _in_flight(problem)
  return [
    Candidate(name, "xla", wrap(asap_jax.softmax_attention), 4 if step else 2),
    Candidate(name, "xla_blocked", wrap(blocked_softmax), blocks, unavailable=no_cache),
    Candidate(name, "jax_nn", wrap(dot_product), 4 if step else 3),
    Candidate(name, "cudnn", wrap(fused), 0, unavailable=_no_cudnn(problem)),
  ]


def _asap(name: str, problem: Problem) -> list[Candidate]:
  linear = name == "asap_linear"

  def function(implementation, query, key, value, dual_map, mask=None):
    options = {"dual_map": dual_map, "implementation": implementation}
    return asap_jax.asap_attention(query, key, value, mask=mask, **options)

  return [
    Candidate(
      name,
      implementation,
      functools.partial(function, implementation),
      _matrices(implementation, problem),
      (random_dual_map(problem, slices, 0 if linear else HIDDEN),),
      slices,
    )
    for slices in (problem.slices[:1] if linear else problem.slices)
    for implementation in _implementations(problem)
  ]


def _part(name: str, problem: Problem) -> list[Candidate]:
  """Parts before the closure: the potentials, or all of the predicted dual."""

  def potentials(query, key, value, dual_map, mask=None):
    points = heads_first(query, key)
    masks = _masks(mask)
    return asap_jax.sliced_potentials(*points, dual_map.directions, *masks)

  def features(query, key, value, dual_map, mask=None):
    return asap_jax.predict_dual(dual_map, *heads_first(query, key), *_masks(mask))

  function = {"potentials": potentials, "features": features}[name]
  dual_map = random_dual_map(problem, problem.slices[0], HIDDEN)
  return [Candidate(name, "xla", function, 0, (dual_map,), problem.slices[0])]


def _sinkhorn(name: str, problem: Problem) -> list[Candidate]:
  """The teacher in all its forms; stopped early, in those that can be fastest."""
  cut = name.partition("@")[2]
  iterations = int(cut) if cut else problem.iterations
  teacher = functools.partial(asap_jax.sinkhorn_attention, iterations=iterations)
  found = []
  if not cut:
    ott = functools.partial(teacher, implementation="ott")
    found.append(Candidate(name, "ott", ott, 3, unavailable=_no_ott()))
    log = functools.partial(log_sinkhorn, iterations=iterations)
    found.append(Candidate(name, "log", log, 3))
  every = _implementations(problem)
  for implementation in (x for x in every if not cut or x != "chunked"):
    function = functools.partial(teacher, implementation=implementation)
    matrices = _matrices(implementation, problem)
    found.append(Candidate(name, implementation, function, matrices))
  return found


def _sinkhorn_step(name: str, problem: Problem) -> list[Candidate]:
  """All iterations, in all forms that have a gradient."""
  iterations, absent = problem.iterations, _no_ott()
  teacher = functools.partial(asap_jax.sinkhorn_attention, iterations=iterations)
  own = [
    Candidate(
      name,
      implementation,
      training_step(functools.partial(teacher, implementation=implementation)),
      4 * _in_flight(problem) if implementation == "xla" else 0,
      unavailable=_no_cudnn(problem) if implementation == "cudnn" else None,
    )
    for implementation in _implementations(problem)
  ]
  ott = functools.partial(teacher, implementation="ott")
  unrolled = functools.partial(unrolled_sinkhorn, iterations=iterations)
  # Unrolled, every iteration keeps matrices for its gradient.
  held = 3.5 * iterations
  return [
    *own,
    Candidate(name, "ott", training_step(ott), 6, unavailable=absent),
    Candidate(name, "ott_unrolled", training_step(unrolled), held, unavailable=absent),
  ]


def _few_steps(name: str, problem: Problem) -> list[Candidate]:
  """Few iterations from a start, in the form that is taken by default, and streamed."""
  start, _, count = name.removesuffix("_step").partition("@")
  few = functools.partial(
    asap_jax.sinkhorn_attention,
    iterations=int(count),
    start="zero" if start == "sinkhorn" else start,
  )
  streamed = functools.partial(few, implementation="chunked")
  return [
    Candidate(name, "default", training_step(few), 4 * _in_flight(problem)),
    Candidate(name, "chunked", training_step(streamed), 0),
  ]


def _peer(name: str, problem: Problem) -> list[Candidate]:
  """Another attention, as `experiments.common.attentions` sets it up."""
  shape = problem.shape
  make = functools.partial(
    build_attention,
    name,
    heads=shape.heads,
    dim=shape.head_dim,
    layer=1,
    rngs=nnx.Rngs(problem.seed),
  )
  try:
    attention = make()
  except ValueError as error:  # it cannot have this shape
    return [Candidate(name, "xla", make, 0, unavailable=str(error))]
  matrices = {
    "esp": 3 * SLICES,
    "lot": 0,
    # A copy of the keys for every coordinate axis.
    **dict.fromkeys(("swgg", "est"), shape.head_dim**2 / shape.length),
  }.get(name, 4)
  if not isinstance(attention, nnx.Module):
    return [Candidate(name, "xla", attention, matrices)]
  graph, state = nnx.split(attention)

  def function(query, key, value, state, mask=None):
    return nnx.merge(graph, state)(query, key, value, mask=mask)

  return [Candidate(name, "xla", function, matrices, (state,))]


def _masks(mask: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Valid queries and keys of all heads."""
  valid = valid_tokens(mask)
  return (None if valid is None else valid[:, None],) * 2


def _in_flight(problem: Problem) -> float:
  """Share of the heads that blocked forms work on at once: on a CPU, few."""
  heads = problem.shape.batch * problem.shape.heads
  return 1.0 / heads if problem.device == "cpu" else 1.0


def _matrices(implementation: str, problem: Problem) -> float:
  return 3 * _in_flight(problem) if implementation == "xla" else 0


def _no_ott() -> str | None:
  missing = importlib.util.find_spec("ott") is None
  return "OTT-JAX is not installed" if missing else None


def _implementations(problem: Problem) -> tuple[str, ...]:
  # On other devices these kernels would be interpreted.
  return (*IMPLEMENTATIONS, "pallas") if problem.device == "tpu" else IMPLEMENTATIONS


def _no_cudnn(problem: Problem) -> str | None:
  if problem.device != "gpu":
    return f"cuDNN needs a GPU, and this is a {problem.device}"
  if problem.shape.dtype not in ("bfloat16", "float16"):
    return f"cuDNN takes bfloat16 or float16, not {problem.shape.dtype}"
  return None


PEERS = ("kernel_sinkhorn", "sinkformer", "esp", "lot", "differential", "swgg", "est")
# In the order of the rows.
METHODS: dict[str, Callable[[str, Problem], list[Candidate]]] = {
  "softmax": _softmax,
  "asap": _asap,
  "asap_linear": _asap,
  "potentials": _part,
  "features": _part,
  "sinkhorn": _sinkhorn,
  "sinkhorn@1": _sinkhorn,
  "sinkhorn@2": _sinkhorn,
  "softmax_step": _softmax,
  "sinkhorn_step": _sinkhorn_step,
  "sinkhorn@2_step": _few_steps,
  "gaussian_diagonal@2_step": _few_steps,
  "gaussian@2_step": _few_steps,
  **dict.fromkeys(PEERS, _peer),
}
