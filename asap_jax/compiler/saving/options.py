"""Arguments bound to an attention function, compared by value."""

import ast
import enum
import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from asap_jax.attention.functions import sinkhorn_attention

_DEFAULTS = {
  name: parameter.default
  for name, parameter in inspect.signature(sinkhorn_attention).parameters.items()
  if parameter.default is not inspect.Parameter.empty
}


def described(options: Mapping[str, Any]) -> dict[str, Any]:
  """Options as JSON takes them: equal where their values are.

  Arrays are bound by the architecture, and are left out.

  >>> import jax.numpy as jnp
  >>> described({"epsilon": np.float64(0.5), "dtype": jnp.bfloat16, "bias": np.ones(2)})
  {'dtype': {'dtype': 'bfloat16'}, 'epsilon': 0.5}
  """
  return {
    name: _plain(name, value)
    for name, value in sorted(options.items())
    if not isinstance(value, jax.Array | np.ndarray)
  }


def _plain(name: str, value: Any) -> Any:
  if isinstance(value, np.generic):
    value = value.item()
  if name == "precision" and isinstance(value, str):
    value = jax.lax.Precision(value)
  if isinstance(value, enum.Enum):
    return {"enum": f"{type(value).__name__}.{value.name}"}
  if value is None or isinstance(value, bool | int | float):
    return value
  if isinstance(value, list | tuple):
    return [_plain(name, each) for each in value]
  try:
    return {"dtype": np.dtype(value).name}
  except TypeError:
    return value if isinstance(value, str) else {"repr": repr(value)}


def differences(
  bound: Mapping[str, Any], before: Mapping[str, Any], written: int
) -> list[str]:
  """What a model binds otherwise than the saved one did, name by name.

  Args:
    bound: arguments of a model.
    before: saved ones, as `described`; in format 2 as they print.
    written: format that they were saved in.
  """
  defaults = described(_DEFAULTS)
  own = described(bound)
  lines = []
  for name in sorted(own.keys() | before.keys()):
    value, saved = own.get(name, defaults.get(name)), before.get(name)
    if written == 2 and name in before:
      same = repr(bound.get(name)) == saved or _parsed(str(saved)) == value
    else:
      saved = before.get(name, defaults.get(name))
      same = value == saved
    if not same:
      lines.append(f"{name}={bound.get(name, defaults.get(name))!r}, saved was {saved}")
  return lines


def _parsed(text: str) -> Any:
  """The value of a literal, as NumPy prints its own too; else the text."""
  number = re.fullmatch(r"(?:np\.)?\w+\((.*)\)", text)
  try:
    return ast.literal_eval(number[1] if number else text)
  except (ValueError, SyntaxError):
    return text
