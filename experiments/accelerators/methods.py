"""Attentions and their parts that `experiments.accelerators` compiles, by name."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import asap_jax
from asap_jax.dual_map.features import COMPILED, feature_count

TPUS = "v5e", "v6e", "v5p"
# Of a map without slices.
UNSLICED = ("query", "cumulants", "gaussian_diagonal")


class Shape(NamedTuple):
  """Of queries, keys and values, in the order of the option."""

  batch: int
  heads: int
  length: int
  head_dim: int


class Options(NamedTuple):
  """What all methods share."""

  dtype: str
  slices: int
  iterations: int


class Case(NamedTuple):
  """A function to compile.

  Attributes:
    function: of queries, keys, values and the parameters.
    parameters: shapes; their leading axis is that of the heads.
  """

  function: Callable[..., Any]
  parameters: Any = ()


def case_of(method: str, shape: Shape, options: Options) -> Case:
  """What a method is, forward; with `_step` its gradient in the tokens beside it."""
  name, is_step = method.removesuffix("_step"), method.endswith("_step")
  case = _METHODS[name](shape, options)
  return case._replace(function=_with_gradient(case.function)) if is_step else case


def is_kernel(method: str) -> bool:
  """Whether a method consists of kernels of our own."""
  return method.removesuffix("_step").endswith("_pallas")


def tokens(shape: Shape, options: Options) -> jax.ShapeDtypeStruct:
  """Shape of queries, keys and values."""
  batch, heads, length, dim = shape
  return jax.ShapeDtypeStruct((batch, length, heads, dim), jnp.dtype(options.dtype))


def _with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
  def loss(*arguments):
    found = jax.tree.leaves(function(*arguments))
    return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in found), found

  def step(query, key, value, *parameters):
    # Of tokens alone: parameters that all of the batch share have a sum over it.
    of_tokens = functools.partial(_apply, loss, parameters)
    slopes, found = jax.grad(of_tokens, has_aux=True)((query, key, value))
    return found, slopes

  return step


def _apply(function, parameters, arrays):
  return function(*arrays, *parameters)


def _attention(function, **fixed):
  def case(shape, options):
    given = {k: v(options) if callable(v) else v for k, v in fixed.items()}
    return Case(functools.partial(function, **given))

  return case


def _compiled(features, **fixed):
  def function(query, key, value, dual_map):
    return asap_jax.asap_attention(query, key, value, dual_map=dual_map, **fixed)

  def case(shape, options):
    dual_map = _dual_map(features, shape, options)
    return Case(function, (dual_map,))

  return case


def _potentials(shape, options):
  def function(query, key, value, directions):
    query, key = (jnp.moveaxis(x, -2, -3) for x in (query, key))
    return asap_jax.sliced_potentials(query, key, directions)[0]

  return Case(function, (_dual_map(COMPILED, shape, options).directions,))


def _dual_map(features, shape, options):
  slices = options.slices if "potentials" in features else 1
  count = feature_count(features, slices, shape.head_dim)
  directions, weights = (
    jax.ShapeDtypeStruct((shape.heads, *own), jnp.float32)
    for own in ((slices, shape.head_dim), (count,))
  )
  return asap_jax.DualMap(directions, weights, features)


_METHODS: dict[str, Callable[[Shape, Options], Case]] = {
  "softmax": _attention(asap_jax.softmax_attention),
  "sinkhorn": _attention(
    asap_jax.sinkhorn_attention, iterations=lambda options: options.iterations
  ),
  "sinkhorn_chunked": _attention(
    asap_jax.sinkhorn_attention,
    iterations=lambda options: options.iterations,
    implementation="chunked",
  ),
  "sinkhorn_pallas": _attention(
    asap_jax.sinkhorn_attention,
    iterations=lambda options: options.iterations,
    implementation="pallas",
  ),
  "gaussian@2": _attention(asap_jax.sinkhorn_attention, iterations=2, start="gaussian"),
  "gaussian@2_pallas": _attention(
    asap_jax.sinkhorn_attention,
    iterations=2,
    start="gaussian",
    implementation="pallas",
  ),
  "asap": _compiled(COMPILED),
  "asap_unsliced": _compiled(UNSLICED),
  "asap_unsliced_pallas": _compiled(UNSLICED, implementation="pallas"),
  "potentials": _potentials,
}
METHODS = tuple(f"{name}{kind}" for name in _METHODS for kind in ("", "_step"))
