"""Where a Linen module calls Sinkhorn attention, and what stands there.

Linen modules are made while they run, so that nothing holds an attention function that
could be replaced. Its calls are answered instead: each in a slot, a variable beside the
parameters of the module that calls. Whatever Linen does to these, in `nn.scan`,
`nn.remat` or `nn.jit`, it does to the slot: recorded calls come out stacked like the
parameters of a scan's layers, and stacked operators go in.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.tracers import current_trace
from jax.experimental.xla_metadata import set_xla_metadata

from asap_jax.attention.functions import sinkhorn_attention
from asap_jax.attention.inputs import Activation
from asap_jax.attention.signature import answering, inputs_of
from asap_jax.compiler.operators import OWN, Operator, Sinkhorn
from asap_jax.compiler.recorder import flatten_batch

COLLECTION, SLOT = "params", "asap"


class Refused(ValueError):
  """A call that nothing else could answer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
  """What a slot has seen in one forward pass.

  Attributes:
    calls: of the attention function, in turn.
    axis: `[0]`, with the axes that Linen stacks on: their place tells where.
    teacher: the operator that is called (static).
  """

  calls: tuple[Activation, ...]
  axis: Any
  teacher: Sinkhorn = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class _Frame:
  """A method of a module that runs, and the attention calls that it has made.

  Attributes:
    module: whose method it is.
    method: its name.
    trace: of JAX, in which it began.
    count: numbers its calls.
  """

  module: nn.Module
  method: str
  trace: Any = dataclasses.field(default_factory=current_trace)
  count: Iterator[int] = dataclasses.field(default_factory=itertools.count)

  def slot(self) -> str:
    """Name of the next call: the same in every run of the method."""
    method = () if self.method == "__call__" else (self.method,)
    index = next(self.count)
    return "_".join([SLOT, *method, *([str(index)] if index else [])])


@contextlib.contextmanager
def _answered(
  answer: Callable[[nn.Module, str, dict[str, Any]], jax.Array | None], purpose: str
) -> Iterator[None]:
  """Answers Sinkhorn attention by module, slot and arguments of the call."""
  frames: list[_Frame] = []

  def intercept(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    frames.append(_Frame(context.module, context.method_name))
    try:
      return function(*args, **kwargs)
    finally:
      frames.pop()

  def of_sinkhorn(name: str, given: dict[str, Any]) -> jax.Array | None:
    # Half an iteration is one softmax: there is nothing to save.
    if name != sinkhorn_attention.__name__ or given["iterations"] == 0:
      return None
    if not frames:
      raise Refused(
        "sinkhorn_attention is called outside of every Linen module: expected a call "
        "in a module's method, beside whose parameters something can lie"
      )
    frame = frames[-1]
    slot = frame.slot()
    if current_trace() != frame.trace:
      # Nothing of the module's may go in or out there.
      raise Refused(
        f"{name_of((*frame.module.path, slot))}: sinkhorn_attention is called inside "
        "of a transformation of JAX's own, such as jax.jit, jax.vmap or "
        "jax.checkpoint, or of a function that is no method; nn.jit, nn.remat, nn.scan "
        "and nn.vmap of modules or methods can be compiled, and attention takes batch "
        "axes without vmap"
      )
    return answer(frame.module, slot, given)

  # What `nn.jit` has traced for another purpose is none of this.
  with (
    set_xla_metadata(asap_jax_purpose=purpose),
    nn.intercept_methods(intercept),
    answering(of_sinkhorn),
  ):
    yield


def recording() -> contextlib.AbstractContextManager[None]:
  """Keeps what each slot sees, as `Seen`; the collection has to be mutable."""

  def record(module: nn.Module, slot: str, given: dict[str, Any]) -> jax.Array:
    teacher = Sinkhorn(**{name: given[name] for name in OWN})
    earlier: Seen | None = module.get_variable(COLLECTION, slot)
    if earlier is not None and earlier.teacher != teacher:
      raise Refused(
        f"{name_of((*module.path, slot))}: called as {earlier.teacher} and as "
        f"{teacher}; expected the same at every call of a module's method"
      )
    calls = () if earlier is None else earlier.calls
    seen = flatten_batch(inputs_of(given))
    module.put_variable(
      COLLECTION, slot, Seen((*calls, seen), jnp.zeros((0,)), teacher)
    )
    # The plan is the same in the scaling domain, and the forward pass faster.
    return sinkhorn_attention(**given | {"implementation": "xla"})

  return _answered(record, "record")


def _replaced() -> contextlib.AbstractContextManager[None]:
  """Calls the operator that lies in a slot, if any."""

  def replace(module: nn.Module, slot: str, given: dict[str, Any]) -> jax.Array | None:
    operator: Operator | None = module.get_variable(COLLECTION, slot)
    if operator is None:
      return None
    given = {name: value for name, value in given.items() if name not in OWN}
    return operator.attention_fn(**given)

  return _answered(replace, "replace")


class CompiledModule(nn.Module):
  """A Linen module whose Sinkhorn attention is answered by what lies in its variables.

  Made by `asap_jax.compile_linen`, with variables that hold an operator, as `"asap"`,
  beside the parameters of each module that calls `sinkhorn_attention`; all else is
  where it was. Under jit, grad and the transformations of Linen, and as a part of
  another module, it is like the module that it wraps. With the variables of the teacher
  it is the teacher.

  Attributes:
    module: the teacher, as it was trained.

  Example:
    >>> from flax import linen
    >>> teacher = linen.MultiHeadDotProductAttention(2, attention_fn=sinkhorn_attention)
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 8))
    >>> parameters = teacher.init(jax.random.key(1), tokens)["params"]
    >>> variables = {"params": parameters | {"asap": Sinkhorn(3)}}
    >>> CompiledModule(teacher).apply(variables, tokens).shape
    (2, 6, 8)
  """

  module: nn.Module

  def setup(self) -> None:
    """Gives the variables the places that they have without this module."""
    nn.share_scope(self, self.module)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """What the module returns."""
    with _replaced():
      return self.module(*args, **kwargs)

  def run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What another method returns, or a function of the module.

    Args:
      method: such as `"encode"`, in `apply(variables, "encode", x, method="run")`.
      *args: for it.
      **kwargs: likewise.
    """
    function = getattr(type(self.module), method) if isinstance(method, str) else method
    with _replaced():
      return function(self.module, *args, **kwargs)


def name_of(path: tuple[str, ...]) -> str:
  """A slot in reports: the path of the module that calls, and what else tells it."""
  *module, slot = path
  own = slot.removeprefix(SLOT).removeprefix("_")
  return ".".join([*module, *([own] if own else [])]) or "attention"
