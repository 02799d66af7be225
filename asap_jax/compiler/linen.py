"""Compiling a Linen module: `asap_jax.compile`, with variables apart from it."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn

from asap_jax.compiler import standing
from asap_jax.compiler.batches import check_batch, check_runs, kind_of
from asap_jax.compiler.clock import milliseconds_in_turn
from asap_jax.compiler.operators import Operator, Sinkhorn, Softmax
from asap_jax.compiler.recipes import Recipe
from asap_jax.compiler.recorded import Calls, Recorded, layers_at
from asap_jax.compiler.recorder import without_explicit_axes
from asap_jax.compiler.report import Report
from asap_jax.compiler.slots import (
  COLLECTION,
  CompiledModule,
  Refused,
  Seen,
  name_of,
  recording,
)
from asap_jax.compiler.unreplaced import shapes_with_every_call_heard

Call = Callable[[nn.Module, Any], Any]
Variables = dict[str, Any] | core.FrozenDict


class CompiledLinen(NamedTuple):
  """Result of `compile_linen`.

  Attributes:
    module: the teacher with its Sinkhorn attention answered by what `variables` hold.
    variables: the teacher's, and an operator beside the parameters of each layer.
    report: what that gains, and its fidelity to the teacher.
  """

  module: CompiledModule
  variables: dict[str, Any]
  report: Report


class _Slot(NamedTuple):
  """Where Sinkhorn attention is called.

  Attributes:
    path: of the slot among the parameters.
    teacher: the operator that is called there.
  """

  path: tuple[str, ...]
  teacher: Sinkhorn

  @property
  def name(self) -> str:
    """In reports."""
    return name_of(self.path)


def compile_linen(
  module: nn.Module,
  variables: Variables,
  batches: Iterable[Any],
  operator: Recipe | Sinkhorn | None = None,
  *,
  target_tv: float = 0.05,
  call: Call = lambda module, batch: module(batch),
  leave: Collection[str] = (),
  seed: int = 0,
  progress: bool = True,
) -> CompiledLinen:
  """Replaces every Sinkhorn attention of a trained Linen module by the best operator.

  `asap_jax.compile` for Linen: see there for what is chosen and how. Any module may
  call `sinkhorn_attention`, as the `attention_fn` of a Flax layer or by itself,
  `nn.scan`, `nn.remat` and `nn.jit` included (docs/models.md). Host code: it does not
  run under jit, vmap or grad; the compiled module does.

  Args:
    module: the teacher.
    variables: of it, as `module.apply` takes them; left untouched.
    batches: see `asap_jax.compile`.
    operator: likewise.
    target_tv: likewise.
    call: how a batch is given to the bound module, in evaluation mode, such as
      `lambda module, batch: module(batch["tokens"], deterministic=True)`.
    leave: names of layers, as in the report, that stay as they are.
    seed: of random directions, of networks and of the order of refinement.
    progress: whether to show progress bars.

  Returns:
    `CompiledLinen`: the compiled module, its variables and the report.

  Raises:
    ValueError: if the module calls no Sinkhorn attention, if a transformation hides
      its calls, if there are too few batches or tokens, if activations are not finite,
      or if an option makes no sense.

  Example:
    >>> from flax import linen
    >>> import asap_jax
    >>> teacher = linen.MultiHeadDotProductAttention(
    ...   2, attention_fn=asap_jax.sinkhorn_attention)
    >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 6, 8))
    >>> variables = teacher.init(jax.random.key(1), batches[0])
    >>> cut = asap_jax.compiler.Sinkhorn(2)
    >>> compiled, variables, report = compile_linen(
    ...   teacher, variables, batches, cut, progress=False)
    >>> compiled.apply(variables, batches[0]).shape, report.layers[0].tv.shape
    ((4, 6, 8), (2,))
  """
  start = time.perf_counter()
  standing.check_wanted(operator, target_tv)
  if not isinstance(module, nn.Module):
    raise ValueError(f"module is of {kind_of(module)}: expected a Flax Linen module")
  if isinstance(module, CompiledModule):
    raise ValueError("module is compiled already: expected the teacher")
  recorded = _Observer(module, variables, batches, call, progress, leave)
  made = standing.wanted(recorded, operator, target_tv, seed)
  compiled = CompiledModule(module)
  own = _with_operators(variables, _operators(recorded, made))
  report = Report(
    layers=tuple(map(standing.report_of, recorded.layers, made)),
    model_milliseconds=_milliseconds(module, variables, own, recorded, call),
    target_tv=target_tv if operator is None else None,
    seconds=time.perf_counter() - start,
  )
  return CompiledLinen(compiled, own, report)


class _Observer(Recorded):
  """A frozen module, its layers, and the streams of what they see."""

  sites: list[_Slot]

  def __init__(
    self,
    module: nn.Module,
    variables: Variables,
    batches: Iterable[Any],
    call: Call,
    progress: bool,
    leave: Collection[str],
  ):
    @jax.jit
    def run(variables: Mapping[str, Any], batch: Any) -> dict[tuple[str, ...], Seen]:
      with recording():
        _, updated = module.apply(variables, batch, method=call, mutable=[COLLECTION])
      return _seen_in(updated.get(COLLECTION, {}))

    def record(batch: Any) -> Calls:
      seen = run(variables, batch)
      return without_explicit_axes([seen[slot.path].calls for slot in self.sites])

    super().__init__([], [], batches, record, progress)
    seen = _shapes_seen(
      run, functools.partial(module.apply, method=call), variables, self.first
    )
    found = [_Slot(path, seen[path].teacher) for path in sorted(seen, key=_natural)]
    unknown = set(leave) - {slot.name for slot in found}
    if unknown:
      raise ValueError(
        f"leave={sorted(unknown)}: no such Sinkhorn attention is called; expected some "
        f"of {[slot.name for slot in found]}"
      )
    self.sites = [slot for slot in found if slot.name not in leave]
    if not self.sites:
      raise ValueError(
        "module calls no Sinkhorn attention on the first batch: expected "
        "asap_jax.sinkhorn_attention as an attention_fn, or called in a method"
      )
    for slot in self.sites:
      if seen[slot.path].axis.shape[-1] != 0:
        raise ValueError(
          f"{slot.name}: its parameters are not stacked on their first axis: expected "
          'variable_axes={"params": 0}'
        )
    self.layers = [
      layer for slot in self.sites for layer in layers_at(slot, seen[slot.path].calls)
    ]


def _shapes_seen(
  run: Callable[[Any, Any], Any],
  plain: Callable[[Any, Any], Any],
  variables: Variables,
  batch: Any,
) -> dict[tuple[str, ...], Seen]:
  """What is recorded of a batch, as shapes."""
  check_batch(batch)
  try:
    return shapes_with_every_call_heard(functools.partial(run, variables), batch)
  except Refused as error:
    raise ValueError(str(error)) from error
  # A module may raise anything, and so may a transformation around a layer.
  except Exception as error:
    check_runs(plain, variables, batch)
    raise ValueError(
      "the module could not be run with its Sinkhorn attention under observation: "
      f"{error}. The attention sits in a transformation that shares its parameters, "
      "such as nn.scan or nn.vmap without variable_axes; with variable_axes="
      '{"params": 0} they can be compiled'
    ) from error


def _seen_in(
  parameters: Mapping[str, Any], path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], Seen]:
  found: dict[tuple[str, ...], Seen] = {}
  for name, value in parameters.items():
    if isinstance(value, Seen):
      found[*path, name] = value
    elif isinstance(value, Mapping):
      found |= _seen_in(value, (*path, name))
  return found


def _natural(path: tuple[str, ...]) -> list[list[tuple[bool, int, str]]]:
  """Sorts names with their numbers as numbers."""
  return [
    [
      (part.isdigit(), int(part) if part.isdigit() else 0, part)
      for part in re.split(r"(\d+)", name)
    ]
    for name in path
  ]


def _operators(
  recorded: _Observer, made: Sequence[standing.Standing]
) -> dict[tuple[str, ...], Operator]:
  """What lies in each slot, stacked where a scan runs several layers."""
  found: dict[tuple[str, ...], Operator] = {}
  for slot in recorded.sites:
    pairs = list(zip(recorded.layers, made, strict=True))
    own = [each.operator for layer, each in pairs if layer.site is slot]
    is_stacked = any(
      layer.index is not None for layer, _ in pairs if layer.site is slot
    )
    found[slot.path] = (
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *own) if is_stacked else own[0]
    )
  return found


def _with_operators(
  variables: Variables, operators: Mapping[tuple[str, ...], Operator]
) -> dict[str, Any]:
  """A copy of variables with operators in their slots."""
  copied = core.unfreeze(variables)
  for (*path, slot), operator in operators.items():
    place = copied.setdefault(COLLECTION, {})
    for name in path:
      place = place.setdefault(name, {})
    place[slot] = operator
  return copied


def _milliseconds(
  module: nn.Module,
  variables: Variables,
  compiled: Mapping[str, Any],
  recorded: _Observer,
  call: Call,
) -> dict[str, float]:
  """Times of a forward pass, as `asap_jax.compiler.models.model_milliseconds`."""
  wrapped = CompiledModule(module)

  def swapped(operator_of: Callable[[Sinkhorn], Operator]) -> Mapping[str, Any]:
    return _with_operators(
      variables, {slot.path: operator_of(slot.teacher) for slot in recorded.sites}
    )

  own = {
    "as trained": swapped(lambda teacher: teacher),
    "exact, fastest": swapped(
      lambda teacher: dataclasses.replace(teacher, implementation=None)
    ),
    "compiled": compiled,
    "softmax": swapped(lambda teacher: Softmax()),
  }
  run = jax.jit(
    lambda variables, batch: wrapped.apply(variables, call, batch, method="run")
  )
  return milliseconds_in_turn(
    {name: functools.partial(run, each, recorded.first) for name, each in own.items()}
  )
