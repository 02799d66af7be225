"""What stands at the sites of a compiled model, described, and blanks of it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from asap_jax.attention.layers import AsapAttention, DualParam
from asap_jax.compiler.kept import CandidateAttention
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.records import compiled_places, keep_record, record_of
from asap_jax.compiler.saving import options
from asap_jax.compiler.saving.arrays import KEPT, describe, is_key
from asap_jax.compiler.sites import Place, Replacement, find_sinkhorn
from asap_jax.dual_map.predict import DualMap

Named = tuple[str, ...]
# Kinds of variables that may stand beside a dual map, by name: nothing else is made
# of what a file says.
KINDS: dict[str, type[nnx.Variable]] = {
  kind.__name__: kind for kind in (nnx.Variable, nnx.Param, nnx.BatchStat, DualParam)
}


def described_sites(model: nnx.Module) -> list[dict[str, Any]]:
  """What stands at every site: a dual map, iterations, or candidates of both.

  Raises:
    ValueError: if it holds beside a dual map what cannot be made again.
  """
  compiled = compiled_places(model)
  found: dict[Place, tuple[dict[str, Any], dict[str, Any]]] = {}
  for place, held in compiled.items():
    if isinstance(held, CandidateAttention):
      found[place] = dict(held.options), _describe_candidates(held)
    elif isinstance(held, AsapAttention):
      found[place] = dict(held.options), _describe_map(held)
  for site in find_sinkhorn(model):
    found[site.path, site.attribute] = site.options, asdict(site.teacher)
  sites = []
  for (path, attribute), (bound, own) in found.items():
    held = compiled.get((path, attribute))
    described: dict[str, Any] = {
      "path": list(path),
      "attribute": attribute,
      "options": options.described(bound),
      "record": record_of(held),
      **own,
    }
    if isinstance(held, nnx.Module):
      described["beside"] = _beside(held, described)
    sites.append(described)
  return sites


def _describe_map(held: AsapAttention) -> dict[str, Any]:
  return {
    "features": list(held.features),
    # Only where it is no query-side map, as all were once.
    **({"side": held.side, "half": held.half} if held.side == "key" else {}),
    "parameters": {
      name: describe(leaf) for name, leaf in held.dual_map.to_named().items()
    },
  }


def _describe_candidates(kept: CandidateAttention) -> dict[str, Any]:
  return {
    "chosen": kept.chosen,
    "tvs": dict(kept.tvs),
    "candidates": {
      label: _describe_map(held) if isinstance(held, AsapAttention) else asdict(held)
      for label, held in kept.operators.items()
    },
  }


def _beside(held: nnx.Module, site: dict[str, Any]) -> list[dict[str, Any]]:
  """Variables that a blank lacks, such as the thresholds of whoever watches."""
  own = {path for path, _ in nnx.to_flat_state(nnx.state(blank_at(site, {})))}
  found = []
  for path, variable in nnx.to_flat_state(nnx.state(held, KEPT)):
    # Arrays among the options are the architecture's.
    if path in own or path[0] == "arrays":
      continue
    kind, name = type(variable).__name__, ".".join(map(str, path))
    value = variable.get_value() if isinstance(variable, nnx.Variable) else None
    if KINDS.get(kind) is not type(variable) or not isinstance(value, jax.Array):
      raise ValueError(
        f"model holds a {kind} at {name} of a compiled attention: expected an array in "
        f"one of {', '.join(KINDS)}"
      )
    if is_key(value):
      raise ValueError(f"model holds PRNG keys at {name} of a compiled attention")
    found.append({"path": list(path), "kind": kind, "array": describe(value)})
  return found


def blank_at(saved: Mapping[str, Any], bound: dict[str, Any]) -> Callable[..., Any]:
  """What stood at a saved site, with zeros for its arrays.

  Args:
    saved: as `described_sites` has it.
    bound: options of the model that it is loaded into.
  """
  blank: Callable[..., Any]
  if "candidates" in saved:
    blanks = {k: _blank(each, bound) for k, each in saved["candidates"].items()}
    blank = CandidateAttention(blanks, saved["tvs"], saved["chosen"], bound)
  else:
    own = _blank(saved, bound)
    if isinstance(own, AsapAttention):
      blank = own
    else:
      blank = Replacement(own.attention_fn, **bound)
  if saved.get("record"):
    keep_record(blank, saved["record"])
  trees: dict[str, Any] = {}
  for each in saved.get("beside", ()):
    shape, dtype = each["array"]
    *above, last = each["path"]
    inner = trees
    for part in above:
      inner = inner.setdefault(part, nnx.Dict())
    inner[last] = KINDS[each["kind"]](jnp.zeros(shape, dtype))
  for name, value in trees.items():
    setattr(blank, name, value)
  return blank


def _blank(saved: Mapping[str, Any], bound: dict[str, Any]) -> Sinkhorn | AsapAttention:
  if "parameters" not in saved:
    names = [field.name for field in fields(Sinkhorn)]
    return Sinkhorn(**{name: saved[name] for name in names if name in saved})
  leaves = {
    name: jnp.zeros(shape, dtype)
    for name, (shape, dtype) in saved["parameters"].items()
  }
  static = {name: saved[name] for name in ("side", "half") if name in saved}
  dual_map = DualMap.from_named(leaves, tuple(saved["features"]), **static)
  return AsapAttention(dual_map, bound)


def trained_with(saved: Mapping[str, Any]) -> dict[str, Any] | None:
  """The teacher that stood at a saved site, if the model's maker told."""
  kept = saved.get("candidates", {}).get("teacher")
  return saved.get("record", {}).get("teacher", kept)


def other_teacher(saved: Mapping[str, Any], teacher: Sinkhorn) -> list[str]:
  """In what a teacher differs from the one whose iterations were replaced.

  All implementations have one plan.
  """
  before, now = trained_with(saved) or {}, asdict(teacher)
  return [
    f"{name}={now[name]}, compiled from {before[name]}"
    for name in now.keys() & before.keys()
    if name != "implementation" and now[name] != before[name]
  ]
