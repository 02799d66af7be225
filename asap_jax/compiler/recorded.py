"""What the Sinkhorn layers of a teacher see on batches, however it was recorded."""

import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from rich.progress import track

from asap_jax.attention.inputs import Activation
from asap_jax.compiler.batches import Stored, check_same
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.packed import unpacked

Calls = list[tuple[Activation, ...]]  # of each layer
Stream = Generator[Calls, None, None]


def is_held_out(index: int) -> bool:
  """Tells whether a batch, counted from zero, is kept to measure on: every fifth."""
  return index % 5 == 1  # not the first, which is there whenever any batch is


@runtime_checkable
class Trained(Protocol):
  """A place where Sinkhorn attention stands in a teacher: one layer, or some of them.

  Attributes:
    name: in reports.
    teacher: the operator that stands there.
  """

  @property
  def name(self) -> str:
    """See the class."""

  @property
  def teacher(self) -> Sinkhorn:
    """See the class."""


class Layer(NamedTuple):
  """Sinkhorn attention, or one of several that a scan runs through one site.

  Attributes:
    site: where the teacher holds it.
    index: position in the scan's stack, `None` if there is no scan.
    heads: number of heads.
    dim: head dimension.
  """

  site: Trained
  index: int | None  # type: ignore[assignment]  # also a method of tuples
  heads: int
  dim: int

  @property
  def name(self) -> str:
    """Name of the site, with the position in a stack."""
    return self.site.name + ("" if self.index is None else f"[{self.index}]")


class Recorded:
  """The layers of a teacher, and streams of what they see on batches.

  Args:
    sites: where Sinkhorn attention stands.
    layers: at those sites; set later where the first batch has to tell.
    batches: every fifth, from the second on, is held out. A sample reads them once and
      as far as it needs. Each stream iterates over all of them again; an iterator that
      can be read only once is stored.
    record: of a batch, what is seen at each site, one per call of it; stacked where a
      site has several layers.
    progress: whether streams show a progress bar.

  Attributes:
    first: the first batch.
    sites: as given.
    layers: likewise.
    progress: likewise.
    sequences: how many were read, `"fitted"` and `"held_out"`.
    timed: once a batch was held out, the call of every layer that operators are timed
      on: the first there, as the model makes it.

  Raises:
    ValueError: if there is no batch.
  """

  def __init__(
    self,
    sites: Sequence[Trained],
    layers: Sequence[Layer],
    batches: Iterable[Any],
    record: Callable[[Any], Calls],
    progress: bool,
  ):
    self.sites, self.layers, self.progress = sites, layers, progress
    self._record = record
    self.timed: Sequence[Activation] = ()
    self.sequences = {"fitted": 0, "held_out": 0}
    once = iter(batches)
    self._stored = Stored(once)
    self._batches = self._stored if once is batches else batches
    self.first = next(iter(self._stored), None)
    if self.first is None:
      raise ValueError("batches is empty: expected at least two batches")

  def activations(self, description: str, *, held_out: bool = False) -> Stream:
    """Calls of every layer, batch by batch, of the batches fitted or held out.

    Raises:
      ValueError: if activations are not finite, a mask is not the outer product of
        valid queries and valid keys, nothing is valid in those held out, or batches
        come in another order than before.
    """
    batches = track(self._batches, description, disable=not self.progress)
    of_stream: list[bool] = []
    read = 0
    for index, batch in enumerate(batches):
      if index == 0:
        check_same(batch, self.first)
      if is_held_out(index) == held_out:
        calls = self._calls(index, batch)
        of_stream.append(_has_valid(calls))
        # All streams read the same.
        read += calls[0][0].query.shape[0]
        self._count(held_out, read)
        yield calls
    if held_out and of_stream and not any(of_stream):
      raise ValueError(_NOTHING_HELD_OUT)

  @property
  def held_out_batches(self) -> Iterator[Any]:
    """Batches held out: those of a sample if there was one, else of all batches."""
    sampled = [each for i, each in enumerate(self._stored.read) if is_held_out(i)]
    every = (each for i, each in enumerate(self._batches) if is_held_out(i))
    return iter(sampled or every)

  def _count(self, held_out: bool, read: int) -> None:
    kind = "held_out" if held_out else "fitted"
    self.sequences[kind] = max(self.sequences[kind], read)

  def _calls(self, index: int, batch: Any) -> Calls:
    """What every layer sees on a batch, packed sequences one by one."""
    calls = _unstack(self._record(batch))
    _check_calls(self.layers, calls)
    if is_held_out(index) and not self.timed:
      self.timed = [of_layer[0] for of_layer in calls]
    return [tuple(map(unpacked, of_layer)) for of_layer in calls]

  def sample(self, sequences: int) -> tuple[list[Calls], list[Calls]]:
    """Calls of every layer on the first batches: fitted, and held out.

    Batches are read until both hold so many sequences, the latter half as many, or
    there are no more.

    Raises:
      ValueError: as `activations`, and if no batch is held out.
    """
    wanted = {False: sequences, True: sequences // 2}
    before = wanted.copy()
    kept: dict[bool, list[Calls]] = {False: [], True: []}
    # Stored, so that a loader that reshuffles is not asked for another pass.
    for index, batch in enumerate(self._stored):
      held_out = is_held_out(index)
      if wanted[held_out] > 0:
        calls = self._calls(index, batch)
        kept[held_out].append(calls)
        wanted[held_out] -= calls[0][0].query.shape[0]
      # A stream is asked for no batch beyond.
      if max(wanted.values()) <= 0:
        break
    for held_out, left in wanted.items():
      self._count(held_out, before[held_out] - left)
    if not kept[True]:
      raise ValueError(
        "batches holds a single batch: expected at least two, one of them to measure on"
      )
    if not any(map(_has_valid, kept[True])):
      raise ValueError(_NOTHING_HELD_OUT)
    return kept[False], kept[True]


_NOTHING_HELD_OUT = (
  "batches: those held out (every fifth, from the second on) hold padding alone: "
  "expected valid tokens to measure on"
)


def _has_valid(calls: Calls) -> bool:
  """Whether every layer sees a valid query in a batch."""
  return all(
    any(call.query_mask is None or bool(call.query_mask.any()) for call in of_layer)
    for of_layer in calls
  )


def layers_at(site: Trained, calls: Sequence[Activation]) -> list[Layer]:
  """The layers of a site: one, or as many as its calls, or their shapes, are stacked.

  Raises:
    ValueError: if they are stacked more than once.
  """
  *stack, _, heads, _, dim = calls[0].query.shape
  if len(stack) > 1:
    raise ValueError(
      f"{site.name}: stacked in {len(stack)} nested scans: expected one at most"
    )
  indices = range(stack[0]) if stack else [None]
  return [Layer(site, index, heads, dim) for index in indices]


def _unstack(calls: Calls) -> Calls:
  """Calls of each layer, taken off the axis that a scan stacks its layers on."""
  unstacked = []
  for of_site in calls:
    if of_site[0].query.ndim == 4:
      unstacked.append(of_site)
      continue
    for index in range(len(of_site[0].query)):
      unstacked.append(jax.tree.map(operator.itemgetter(index), of_site))
  return unstacked


def _check_calls(layers: Sequence[Layer], calls: Calls) -> None:
  for layer, of_layer in zip(layers, calls, strict=True):
    for activation in of_layer:
      if not _is_finite((activation.query, activation.key)):
        raise ValueError(
          f"{layer.name}: queries or keys are not finite on a calibration batch: the "
          "teacher overflows there"
        )
      if not _is_finite(activation.bias):
        raise ValueError(
          f"{layer.name}: bias is not finite on a calibration batch, at valid queries "
          "and keys; for padding pass mask=nnx.make_attention_mask(query_valid, "
          "key_valid), and the bias may hold anything there"
        )
      if activation.is_product is not None and not activation.is_product:
        raise ValueError(
          f"{layer.name}: its mask is not the outer product of valid queries and valid "
          "keys, so its plan is not doubly stochastic; expected "
          "nnx.make_attention_mask(query_valid, key_valid), or of packed sequences as "
          "many as max_segments"
        )


@jax.jit
def _is_finite(arrays: Any) -> jax.Array:
  return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]).all()
