"""Configurations and values of attention calls, drawn at random."""

import dataclasses
import random
from typing import Any

import jax.numpy as jnp
import numpy as np

# Function, implementation and closures, as they are compiled.
METHODS = (
  *(("softmax", None, 0),),
  *(("sinkhorn", "ott", count) for count in (1, 3, 20)),
  *(("sinkhorn", "xla", count) for count in (0, 1, 2, 3, 20)),
  *(("sinkhorn", "chunked", count) for count in (0, 1, 3, 20)),
  *(("asap", "xla", count) for count in (0, 1, 2, 5)),
  *(("asap", "chunked", count) for count in (0, 1, 2)),
)
MASKS = "none", "padding", "segments", "bias"
# Of logits; of 0, all keys are tied.
SCALES = 0.0, 1.0, 30.0, 1000.0
_LENGTHS = 1, 2, 3, 5, 8, 17
_DTYPES = "float32", "float32", "bfloat16", "float16"


@dataclasses.dataclass(frozen=True)
class Config:
  """What is compiled once: everything but values.

  Attributes:
    function: `"softmax"`, `"sinkhorn"` or `"asap"`.
    implementation: of it.
    count: iterations, or closures; none is half a closure.
    mask: one of `MASKS`.
    dtype: of queries, keys and values.
    batch: elements, none too.
    heads: of queries.
    kv_heads: of keys and values.
    n: queries.
    m: keys.
    dim: of a head.
    start: of the iterations.
    features: of the dual map.
  """

  function: str
  implementation: str | None
  count: int
  mask: str
  dtype: str
  batch: int
  heads: int
  kv_heads: int
  n: int
  m: int
  dim: int
  start: str
  features: tuple[str, ...]

  @property
  def method(self) -> str:
    """As it is reported."""
    return f"{self.function} {self.implementation or ''}".strip()


def configs(count: int, seed: int) -> list[Config]:
  """So many, all methods and masks in turn."""
  drawn = random.Random(seed)
  found = []
  for index in range(count):
    function, implementation, closures = METHODS[index % len(METHODS)]
    # Another mask each time that a method comes.
    mask = MASKS[(index + index // len(METHODS)) % len(MASKS)]
    n = drawn.choice(_LENGTHS)
    is_square = mask == "segments" or n == 1
    heads = drawn.choice((1, 2, 4))
    features = drawn.choice((("query", "cumulants"), ("potentials",), ("gaussian",)))
    found.append(
      Config(
        function=function,
        implementation=implementation,
        count=closures,
        mask=mask,
        dtype=drawn.choice(_DTYPES),
        batch=0 if index % 23 == 22 else drawn.choice((1, 2, 5)),
        heads=heads,
        kv_heads=drawn.choice([h for h in (1, 2, 4) if heads % h == 0]),
        n=n,
        # A single query with several keys has no doubly stochastic plan but one.
        m=n if is_square else drawn.choice(_LENGTHS),
        dim=drawn.choice((1, 4, 8)),
        start="gaussian" if closures == 0 else drawn.choice(("zero", "gaussian")),
        features=features,
      )
    )
  return found


def values(config: Config, random: np.random.Generator) -> dict[str, Any]:
  """Tokens with logits of a drawn scale, and what masks them; padding holds NaN."""
  scale = random.choice(SCALES)
  of = config.batch, config.n, config.heads, config.dim
  of_keys = config.batch, config.m, config.kv_heads, config.dim
  # Logits are q k / sqrt(dim), of deviation `scale`.
  query, key = (random.normal(size=s) * scale**0.5 for s in (of, of_keys))
  if random.random() < 0.25:  # ties
    query, key = (
      x[:, random.integers(x.shape[1], size=x.shape[1])] for x in (query, key)
    )
  value = random.normal(size=(*of_keys[:-1], 3))
  value[..., 0] = 1.0  # the sum of a row
  tokens = {"query": query, "key": key, "value": value}
  own: dict[str, Any] = {"query_valid": None, "ids": None, "bias": None}
  if config.mask == "padding":
    valid = [_valid(random, config.batch, size) for size in (config.n, config.m)]
    if config.n == config.m and random.random() < 0.5:
      valid[1] = valid[0]
    own |= {"query_valid": valid[0], "key_valid": valid[1]}
  elif config.mask == "segments":
    own["ids"] = np.sort(random.integers(0, 4, size=(config.batch, config.n)), -1)
    own |= {"query_valid": own["ids"] > 0, "key_valid": own["ids"] > 0}
  elif config.mask == "bias":
    size = config.batch, config.heads, config.n, config.m
    own["bias"] = np.float32(random.normal(size=size) * min(scale, 30.0))
  if own["query_valid"] is not None and random.random() < 0.5:
    query[~own["query_valid"]] = np.nan
    key[~own["key_valid"]] = np.inf
    value[~own["key_valid"]] = np.nan
  return {k: jnp.asarray(v, config.dtype) for k, v in tokens.items()} | own


def _valid(random: np.random.Generator, batch: int, size: int) -> np.ndarray:
  """From none to all of the tokens, anywhere or at the beginning."""
  count = random.integers(0, size + 1, size=(batch, 1))
  order = np.argsort(random.random((batch, size)), -1)
  return (np.arange(size) if random.random() < 0.5 else order) < count
