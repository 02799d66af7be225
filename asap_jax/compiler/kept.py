"""Candidates kept in a compiled model, to choose from on another device."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from asap_jax.attention.layers import AsapAttention
from asap_jax.compiler.operators import Sinkhorn
from asap_jax.compiler.report import TEACHER


class CandidateAttention(nnx.Module):
  """Operators that may stand in one place, of which one runs: an `attention_fn`.

  Made by `asap_jax.compile` with `keep_candidates=True`. `asap_jax.choose` leaves the
  one that is the fastest on the device at hand.

  Args:
    operators: by label; iterations, and modules of dual maps. The teacher is among
      them, as `"teacher"`.
    tvs: of each to the teacher's plans on held-out batches, one for each layer that
      runs through the place.
    chosen: label of the one that runs.
    options: further arguments bound to all of them.

  Example:
    >>> operators = {"teacher": Sinkhorn(20, "ott"), "sinkhorn@20": Sinkhorn(20)}
    >>> exact = dict.fromkeys(operators, (0.0,))
    >>> attention = CandidateAttention(operators, exact, "sinkhorn@20")
    >>> tokens = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    >>> attention(tokens, tokens, tokens).shape
    (2, 6, 4, 8)
  """

  def __init__(
    self,
    operators: Mapping[str, Sinkhorn | AsapAttention],
    tvs: Mapping[str, Sequence[float]],
    chosen: str,
    options: dict[str, Any] | None = None,
  ):
    maps = {k: v for k, v in operators.items() if isinstance(v, AsapAttention)}
    self.maps = nnx.Dict(maps)
    self.iterations = nnx.static(
      tuple((k, v) for k, v in operators.items() if isinstance(v, Sinkhorn))
    )
    self.tvs = tuple((label, tuple(tvs[label])) for label in operators)
    self.chosen = chosen
    self.options = tuple(sorted((options or {}).items()))

  @property
  def operators(self) -> dict[str, Sinkhorn | AsapAttention]:
    """By label."""
    found: dict[str, Any] = {**dict(self.iterations), **dict(self.maps.items())}
    return {label: found[label] for label, _ in self.tvs}

  @property
  def teacher_function(self) -> Callable[..., jax.Array]:
    """The attention function that the model was trained with."""
    teacher = dict(self.iterations)[TEACHER]
    return functools.partial(teacher.attention_fn, **dict(self.options))

  def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
    """The chosen operator; see `asap_jax.attention.AttentionFn` for arguments."""
    operator = self.operators[self.chosen]
    if isinstance(operator, AsapAttention):
      return operator(*args, **kwargs)
    return operator.attention_fn(*args, **(dict(self.options) | kwargs))
