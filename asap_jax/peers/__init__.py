"""Other attentions under the signature of `asap_jax.softmax_attention`.

Each follows its paper's formulas. Learned parameters are a pytree passed by keyword, or
held by the module of that name in `asap_jax.peers.layers`.

| name | attention | rows | columns |
| --- | --- | --- | --- |
| `softmax` | plain | exact | any |
| `sinkhorn`, `sinkhorn@k` | Sinkhorn, cut to k full iterations | exact | approximate |
| `gaussian@k` | k iterations from the Gaussian start | exact | approximate |
| `kernel_sinkhorn` | Sinkhorn on the plain kernel | exact | approximate |
| `sinkformer` | Sinkhorn cut to half-steps | exact or approximate | the other |
| `esp` | ESPFormer | approximate, hard: exact | as rows |
| `lot` | LOTFormer | exact | approximate |
| `swgg`, `est` | sliced plans | exact | exact |
| `qr`, `cayley` | squares of an orthogonal matrix | exact | exact |
| `qontot` | squared moduli of a circuit's unitary matrix | exact | exact |
| `differential` | difference of two softmax maps | 1 - lambda | any |
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from asap_jax.attention.functions import sinkhorn_attention, softmax_attention
from asap_jax.peers.differential import (
  DifferentialParameters,
  differential_attention,
  lambda_init,
)
from asap_jax.peers.esp import esp_attention
from asap_jax.peers.kernel_sinkhorn import (
  kernel_sinkhorn_attention,
  sinkformer_attention,
)
from asap_jax.peers.lot import Pivot, lot_attention
from asap_jax.peers.orthostochastic import cayley_attention, qr_attention
from asap_jax.peers.qontot import qontot_attention
from asap_jax.peers.sliced import est_attention, swgg_attention

ATTENTIONS: dict[str, Callable[..., Any]] = {
  "softmax": softmax_attention,
  "sinkhorn": sinkhorn_attention,
  "kernel_sinkhorn": kernel_sinkhorn_attention,
  "sinkformer": sinkformer_attention,
  "esp": esp_attention,
  "lot": lot_attention,
  "swgg": swgg_attention,
  "est": est_attention,
  "qr": qr_attention,
  "cayley": cayley_attention,
  "qontot": qontot_attention,
  "differential": differential_attention,
}
_STARTS: dict[str, Any] = {"sinkhorn": "zero", "gaussian": "gaussian"}


def attention_named(name: str, **options: Any) -> Callable[..., Any]:
  """Attention function of `ATTENTIONS`, with options bound.

  >>> from asap_jax.peers import attention_named
  >>> tokens = jnp.ones((2, 5, 4, 8))
  >>> attention_named("sinkhorn@3", epsilon=0.5)(tokens, tokens, tokens).shape
  (2, 5, 4, 8)

  Args:
    name: a key of `ATTENTIONS`, or `sinkhorn@k` for k full iterations from zero, or
      `gaussian@k` for so many from the Gaussian start.
    **options: keyword arguments of the function.

  Returns:
    The function, or a `functools.partial` of it.

  Raises:
    ValueError: if the name or an option is unknown, or k is no number of iterations.
  """
  base, at, count = name.partition("@")
  if at and base in _STARTS:
    own, least = {"start": _STARTS[base]}, 0 if base == "gaussian" else 1
    if not count.isdecimal() or int(count) < least:
      raise ValueError(
        f"name={name!r}: expected {base}@k with k = {least}, {least + 1}, ..."
      )
    own["iterations"] = int(count)
    for option in own.keys() & options.keys():
      raise ValueError(f"{option}={options[option]}: {name!r} says it already")
    name, options = "sinkhorn", options | own
  if name not in ATTENTIONS:
    known = [*ATTENTIONS, "sinkhorn@k", "gaussian@k"]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"name={name!r}: expected one of {', '.join(known)}{hint}")
  function = ATTENTIONS[name]
  accepted = list(inspect.signature(function).parameters)[3:]
  for option in options:
    if option not in accepted:
      raise ValueError(f"{option}: {name} takes {', '.join(accepted)}")
  return functools.partial(function, **options) if options else function


__all__ = [
  "ATTENTIONS",
  "DifferentialParameters",
  "Pivot",
  "attention_named",
  "cayley_attention",
  "differential_attention",
  "esp_attention",
  "est_attention",
  "kernel_sinkhorn_attention",
  "lambda_init",
  "lot_attention",
  "qontot_attention",
  "qr_attention",
  "sinkformer_attention",
  "sinkhorn_attention",
  "softmax_attention",
  "swgg_attention",
]
