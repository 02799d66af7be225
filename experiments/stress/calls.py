"""Attention calls of drawn shapes and values, against float64."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import asap_jax
from asap_jax.dual_map.features import feature_count
from asap_jax.teacher.starts import starting_dual
from experiments.stress import exact
from experiments.stress.drawn import Config, values

SEGMENTS = 3
# Of the last place of float32, times the largest number that is exponentiated.
_PLACES = 16
_ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-6, "float16": 2.0**-9}


def measured(configs: Sequence[Config], draws: int, seed: int) -> list[dict[str, Any]]:
  """A row per method: how many calls, and in how many something is wrong."""
  rows: dict[str, dict[str, Any]] = {}
  for index, config in enumerate(configs):
    row = rows.setdefault(
      config.method,
      {"method": config.method, "shapes": 0, "tried": 0, "not_finite": 0}
      | {"rows_off": 0, "padding_not_zero": 0, "beyond_bound": 0, "lost": 0}
      | {"worst_share": 0.0, "worst_row": 0.0},
    )
    row["shapes"] += 1
    _measure(config, draws, [seed, index], row)
  return list(rows.values())


def _measure(config: Config, draws: int, seed: list[int], row: dict[str, Any]) -> None:
  random = np.random.default_rng(seed)
  dual_map = _map(config, random)
  call = jax.jit(functools.partial(_call, config))
  start = jax.jit(functools.partial(_start, config))
  for _ in range(draws):
    given = values(config, random)
    arrays = {k: v for k, v in given.items() if v is not None}
    out = np.asarray(call(dual_map, arrays), np.float64)
    expected, size, valid = _expected(config, given, start(dual_map, arrays))
    row["tried"] += 1
    if out.shape != expected.shape:
      raise ValueError(f"{config}: {out.shape}, expected {expected.shape}")
    if out.size == 0:
      continue
    row_error = np.abs(out[..., 0] - 1.0)[valid].max(initial=0.0)
    rounding = _ROUNDING[config.dtype]
    bound = rounding + _PLACES * 2.0**-23 * size
    # Of values; rows are exact whatever the logits are.
    largest = np.abs(np.nan_to_num(np.asarray(given["value"], np.float64))).max()
    largest = max(largest, 1.0)
    # OTT-JAX's plan is the exponential of logits and duals, and as exact as these.
    of_rows = bound if config.implementation == "ott" else 4 * rounding
    share = np.abs(out - expected).max() / (bound * largest)
    found = {
      "not_finite": not np.isfinite(out).all(),
      "rows_off": not row_error <= of_rows,
      "padding_not_zero": bool((out[~valid] != 0).any()),
      "beyond_bound": not share <= 1.0,
    }
    for name, wrong in found.items():
      row[name] += wrong
    if any(found.values()):
      wrong_of = [name for name, wrong in found.items() if wrong]
      row["lost"] += 1
      print(f"{config}, draw {row['tried']}: {wrong_of}, {share:.3g}, {row_error:.3g}")
    row["worst_share"] = max(row["worst_share"], float(np.nan_to_num(share)))
    row["worst_row"] = max(row["worst_row"], float(np.nan_to_num(row_error)))


def _map(config: Config, random: np.random.Generator) -> asap_jax.DualMap:
  count = feature_count(config.features, 2, config.dim)
  side, half = ("key", True) if config.count == 0 else ("query", False)
  shape = config.heads, 2, config.dim
  plain = asap_jax.DualMap(
    jnp.asarray(random.normal(size=shape), jnp.float32),
    jnp.asarray(random.normal(size=(config.heads, count)) * 0.3, jnp.float32),
    config.features,
    side=side,  # type: ignore[arg-type]
    half=half,
  )
  return plain if half else plain.with_closures(config.count)


def _call(config: Config, dual_map: Any, given: dict[str, Any]) -> jax.Array:
  options: dict[str, Any] = {"bias": given.get("bias")}
  if config.mask == "padding":
    valid = given["query_valid"][:, None, :, None], given["key_valid"][:, None, None]
    options["mask"] = valid[0] & valid[1]
  elif config.mask == "segments":
    options |= {"segment_ids": given["ids"], "max_segments": SEGMENTS}
  tokens = given["query"], given["key"], given["value"]
  if config.function == "softmax":
    return asap_jax.softmax_attention(*tokens, **options)
  options["implementation"] = config.implementation
  if config.function == "asap":
    return asap_jax.asap_attention(*tokens, dual_map=dual_map, **options)
  return asap_jax.sinkhorn_attention(
    *tokens, iterations=config.count, start=config.start, **options
  )


def _start(config: Config, dual_map: Any, given: dict[str, Any]) -> jax.Array:
  """The dual that the closures begin with: what is learned or in closed form."""
  side = "key" if config.count == 0 else "query"
  repeat = config.heads // config.kv_heads
  query, key = (
    jnp.moveaxis(given[name].astype(jnp.float32), -2, -3) for name in ("query", "key")
  )
  key = jnp.repeat(key, repeat, -3)
  if config.function == "softmax":
    return jnp.zeros(query.shape[:-1])
  query = query * config.dim**-0.5

  def dual(*valid: jax.Array | None) -> jax.Array:
    masks = [None if each is None else each[:, None] for each in valid]
    tokens = [
      x if mask is None else jnp.where(mask[..., None], x, 0.0)
      for x, mask in zip((query, key), masks, strict=True)
    ]
    if config.function == "asap":
      return asap_jax.predict_dual(dual_map, *tokens, *masks)
    return starting_dual(config.start, *tokens, *masks, side=side)  # type: ignore[arg-type]

  if config.mask == "segments":
    ids = given["ids"]
    of_each = [
      jnp.where((ids == s)[:, None], dual(ids == s, ids == s), 0.0)
      for s in range(1, SEGMENTS + 1)
    ]
    return sum(of_each[1:], of_each[0])
  return dual(given.get("query_valid"), given.get("key_valid"))


def _expected(
  config: Config, given: dict[str, Any], start: jax.Array
) -> tuple[np.ndarray, float, np.ndarray]:
  """Output in float64, the largest number in an exponent, and which queries count."""
  repeat = config.heads // config.kv_heads
  query, key, value = (
    np.moveaxis(np.asarray(given[name], np.float64), -2, -3)
    for name in ("query", "key", "value")
  )
  key, value = (np.repeat(x, repeat, -3) for x in (key, value))
  shape = config.batch, 1, config.n, config.m
  allowed: Any = np.ones(shape, bool)
  if config.mask == "padding":
    allowed = given["query_valid"][:, None, :, None] & given["key_valid"][:, None, None]
  elif config.mask == "segments":
    ids = given["ids"]
    allowed = (ids[:, None, :, None] == ids[:, None, None]) & (ids > 0)[:, None, None]
  keep = allowed.any(-1)[..., None], allowed.any(-2)[..., None]
  query = np.where(keep[0], query, 0.0)
  key, value = np.where(keep[1], key, 0.0), np.where(keep[1], value, 0.0)
  logits = query @ np.swapaxes(key, -1, -2) * config.dim**-0.5
  if given["bias"] is not None:
    logits = logits + given["bias"]
  f = np.asarray(start, np.float64)
  size = np.abs(logits).max(initial=0) + np.abs(f).max(initial=0)
  logits = np.where(allowed, logits, -np.inf)
  if config.function == "softmax":
    plan = exact.softmax_plan(logits)
  elif config.count == 0:
    plan = exact.half_plan(logits, f)
  else:
    plan = exact.sinkhorn_plan(logits, allowed, f, config.count)
  valid = np.broadcast_to(allowed.any(-1), (*plan.shape[:-1],))
  out = np.moveaxis(plan @ value, -3, -2)
  # Each closure rounds anew.
  return out, size * max(config.count, 1), np.moveaxis(valid, -2, -1)
