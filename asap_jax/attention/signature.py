"""From a short core to the signature that Flax's attention layers call.

A core is `core(inputs, *, option=...)`: it turns `Inputs` into a plan and returns
`inputs.attend(plan)`. `attention_fn` makes of it an `AttentionFn`: a function with all
arguments of Flax, named one by one (Linen passes on only what it finds in the
signature), and the core's own options after them.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from asap_jax.attention.inputs import Dropout, Inputs, Sown, prepare
from asap_jax.attention.masks import Ids, exclude, restrict, weighted
from asap_jax.attention.meshes import Attended, on_mesh
from asap_jax.numerics import with_usual_promotion


class AttentionFn(Protocol):
  """A function that Flax's attention layers take as their `attention_fn`."""

  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: object | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = True,
    einsum_dot_general: None = None,
    qk_attn_weights_einsum: None = None,
    attn_weights_value_einsum: None = None,
    *,
    scale: float | None = None,
    epsilon: float | jax.Array = 1.0,
    segment_ids: Ids | None = None,
    max_segments: int | None = None,
    query_weights: jax.Array | None = None,
    key_weights: jax.Array | None = None,
    **options: Any,
  ) -> jax.Array:
    """Values weighted by attention; the arguments that all functions here share.

    Args:
      query: `[batch..., n, heads, dim]`.
      key: `[batch..., m, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
      value: `[batch..., m, kv_heads, features]`.
      bias: added to the logits, broadcast to `[batch..., heads, n, m]`.
      mask: true (or nonzero) where a query may attend to a key, broadcast likewise. A
        doubly stochastic function takes the outer product of valid queries and valid
        keys, `nnx.make_attention_mask(query_valid, key_valid)`.
      broadcast_dropout: whether all batch elements and heads drop the same weights.
      dropout_rng: PRNG key, needed when dropout is active.
      dropout_rate: share of attention weights to drop.
      deterministic: switches dropout off.
      dtype: dtype of the inputs' products and of the result; inferred by default.
      precision: of the two products (`jax.lax.Precision`); `"default"` trades it for
        speed. If it is not given, logits keep their float32: a GPU would round float32
        queries and keys to TF32, a TPU to bfloat16. Inputs of 16 bits are multiplied
        as fast as loses nothing of them, float32 values at the device's default.
      module: where to sow the weights, as `attention_weights`.
      is_causal: forbids attention to later keys; see Raises.
      force_fp32_for_softmax: accepted for Linen; logits are always float32.
      einsum_dot_general: accepted for Linen; must be `None`, as the next two.
      qk_attn_weights_einsum: see `einsum_dot_general`.
      attn_weights_value_einsum: see `einsum_dot_general`.
      scale: of the logits, 1 / sqrt(dim) by default.
      epsilon: entropic regularisation, or temperature: the logits are divided by it. It
        may be traced, and has a gradient.
      segment_ids: of packed sequences, integers `[batch..., length]`, or a pair of them
        for queries and keys: tokens see those of the same number, counted from one, and
        zero is padding. The plan of each segment is the one it has by itself. In place
        of a mask. Some functions do not take them, and say so.
      max_segments: most segments of one element of the batch, which has to be known
        under jit where each is looked at by itself (a Gaussian start, a dual map). With
        it a mask of pairs is taken for that of segments, as
        `nnx.make_attention_mask(ids, ids, jnp.equal)` is, which is how Flax's layers
        pass them on: bind it.
      query_weights: masses of the queries, up to a factor, `[batch..., n]` or with
        heads `[batch..., heads, n]`; zero is padding, as where a mask says so, and
        boolean ones are a mask. Rows of the transport plan then sum to them and its
        columns to the keys', instead of equal shares; the weights of a query are its
        row divided by its sum, so that they sum to one as ever. Differentiable. Not
        with segments. Some functions do not take them, and say so.
      key_weights: masses of the keys, `[batch..., m]` or `[batch..., heads, m]`.
      **options: a function's own, which its docstring describes.

    Returns:
      `[batch..., n, heads, features]`, zero at queries that may attend to nothing.
      Under jit, where a mask's values cannot be checked, an element whose mask is not
      the outer product that a doubly stochastic function needs, or has too many
      segments, is NaN.

    Raises:
      ValueError: if shapes do not fit or an argument must be `None`; of doubly
        stochastic functions, also for causal use or one-token decoding (a causal
        doubly stochastic matrix is the identity) and for a mask that is no outer
        product.
    """


_COMMON = [
  parameter
  for parameter in inspect.signature(AttentionFn.__call__).parameters.values()
  if parameter.name not in ("self", "options")
]
_UNSUPPORTED = (
  "einsum_dot_general",
  "qk_attn_weights_einsum",
  "attn_weights_value_einsum",
)


# Told of the function's name and of all arguments of a call.
Listener = Callable[[str, dict[str, Any]], None]
_LISTENER: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
  "listener", default=None
)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
  """Tells a listener of every call of an attention function meanwhile.

  Only of calls that Python makes: what JAX takes from a cache is not heard. A listener
  inside another replaces it; `None` hears nothing.
  """
  token = _LISTENER.set(listener)
  try:
    yield
  finally:
    _LISTENER.reset(token)


# Of the function's name and all arguments: what to return in its place, or `None`.
Answer = Callable[[str, dict[str, Any]], jax.Array | None]
_ANSWER: contextvars.ContextVar[Answer | None] = contextvars.ContextVar(
  "answer", default=None
)


@contextlib.contextmanager
def answering(answer: Answer | None) -> Iterator[None]:
  """Lets another answer the calls of attention functions meanwhile.

  Of calls that Python makes, as with `listening`. It is asked for none that it makes
  itself.
  """
  token = _ANSWER.set(answer)
  try:
    yield
  finally:
    _ANSWER.reset(token)


def attention_fn(
  core: Callable[..., Array] | None = None,
  *,
  any_mask: bool = False,
  takes_bias: bool = True,
  takes_segments: bool = False,
  takes_masses: bool = False,
  parts: int = 1,
  is_pair: bool = False,
) -> Any:
  """An `AttentionFn` made of a core (module docstring).

  Args:
    core: `core(inputs, *, ...)`.
    any_mask: whether masks other than an outer product of valid tokens, causal ones
      included, make sense.
    takes_bias: whether a bias of the logits does.
    takes_segments: whether it serves packed sequences; those that take any mask do.
    takes_masses: whether queries and keys may have unequal masses.
    parts: parts that queries and keys are cut into; the default scale is that of one.
    is_pair: whether the core returns a number beside the values.

  Returns:
    The attention function; without `core`, a decorator.
  """
  if core is None:
    return functools.partial(
      attention_fn,
      any_mask=any_mask,
      takes_bias=takes_bias,
      takes_segments=takes_segments,
      takes_masses=takes_masses,
      parts=parts,
      is_pair=is_pair,
    )
  own = list(inspect.signature(core).parameters.values())[1:]
  signature = inspect.Signature([*_COMMON, *own])

  @functools.wraps(core)
  def function(*args: Any, **kwargs: Any) -> Any:
    given = signature.bind(*args, **kwargs)
    options = {p.name: given.arguments[p.name] for p in own if p.name in given.kwargs}
    given.apply_defaults()
    listener = _LISTENER.get()
    if listener is not None:
      listener(core.__name__, given.arguments)
    answer = _ANSWER.get()
    if answer is not None:
      with answering(None):
        answered = answer(core.__name__, given.arguments)
      if answered is not None:
        return answered
    for argument in _UNSUPPORTED:
      if given.arguments[argument] is not None:
        raise ValueError(f"{argument}: not supported by {core.__name__}; expected None")
    if given.arguments["bias"] is not None and not takes_bias:
      raise ValueError(
        f"bias: {core.__name__} has no logits to add it to; expected None"
      )
    for argument in ("segment_ids", "max_segments"):
      if given.arguments[argument] is not None and not (takes_segments or any_mask):
        raise ValueError(
          f"{argument}: {core.__name__} does not serve packed sequences; expected "
          "None, and each sequence in an element of the batch"
        )
    for argument in ("query_weights", "key_weights"):
      if given.arguments[argument] is not None and not takes_masses:
        raise ValueError(
          f"{argument}: {core.__name__} gives all valid tokens equal mass; expected "
          "None, and padding as a mask"
        )
    arrays = dict(given.arguments)
    module = arrays.pop("module")

    @with_usual_promotion
    def attend(arrays: dict[str, Any]) -> Attended:
      sown = None if module is None else Sown()
      inputs = inputs_of(arrays | {"sown": sown}, any_mask, parts)
      if inputs.query.size == 0:
        shape = *arrays["query"].shape[:-1], inputs.value.shape[-1]
        nothing = jnp.zeros(shape, inputs.value.dtype)  # of a batch without elements
        return Attended(nothing, jnp.zeros(()) if is_pair else None)
      found = core(inputs, **{name: arrays[name] for name in options})
      out, number = found if is_pair else (found, None)
      return Attended(out, number, None if sown is None else sown.weights)

    found = on_mesh(attend, arrays, has_number=is_pair, has_weights=module is not None)
    if found.weights is not None:
      kind = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
      module.sow(kind, "attention_weights", found.weights)
    return (found.values, found.number) if is_pair else found.values

  function.__signature__ = signature  # type: ignore[attr-defined]
  return function


def named_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
  """Arguments of a call that all attention functions share, defaults included."""
  signature = inspect.Signature(_COMMON)
  shared = {name: kwargs[name] for name in kwargs if name in signature.parameters}
  given = signature.bind(*args, **shared)
  given.apply_defaults()
  return dict(given.arguments)


def inputs_of(given: dict[str, Any], any_mask: bool = False, parts: int = 1) -> Inputs:
  """Laid-out inputs of a call whose arguments are all bound by name."""
  scale = given["scale"]
  if scale is None and parts > 1:
    scale = (given["query"].shape[-1] / parts) ** -0.5
  names = ("query", "key", "value", "bias", "dtype", "precision", "epsilon")
  inputs = prepare(**{name: given[name] for name in names}, scale=scale)
  told = given["mask"], given["is_causal"], given["segment_ids"]
  if any_mask:
    inputs = exclude(inputs, *told)
  else:
    inputs = restrict(inputs, *told, given["max_segments"])
  inputs = weighted(inputs, given["query_weights"], given["key_weights"], any_mask)
  active = not given["deterministic"]
  rate = given["dropout_rate"]
  if not isinstance(rate, jax.core.Tracer) and not 0 <= rate <= 1:
    raise ValueError(f"dropout_rate={rate}: expected a number from 0 to 1")
  dropout = Dropout(
    given["dropout_rng"] if active else None,
    rate if active else 0.0,
    given["broadcast_dropout"],
    given.get("sown"),
  )
  return dataclasses.replace(inputs, dropout=dropout)
