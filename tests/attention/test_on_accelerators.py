"""What every attention is lowered to for a GPU and a TPU, which need not be there."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import lowered

import asap_jax
from asap_jax import DualMap, asap_attention, sinkhorn_attention
from asap_jax.dual_map.features import COMPILED, feature_count

# All differ, so that products are told apart by their sizes.
BATCH, HEADS, N, M, DIM, FEATURES, SLICES = 2, 4, 16, 24, 8, 5, 3
UNSLICED = ("query", "cumulants", "gaussian")


def dual_map(features=COMPILED):
  slices = SLICES if features == COMPILED else 1
  count = feature_count(features, slices, DIM)
  return DualMap(jnp.ones((HEADS, slices, DIM)), jnp.ones((HEADS, count)), features)


sinkhorn = functools.partial(sinkhorn_attention, iterations=3)
# Without loops whose condition is data: forward, and with the gradient.
ATTENTIONS = {
  "softmax": (asap_jax.softmax_attention, True, True),
  "sinkhorn": (sinkhorn, False, False),
  "chunked": (functools.partial(sinkhorn, implementation="chunked"), False, False),
  "gaussian": (
    functools.partial(sinkhorn, start="gaussian", iterations=2), True, False
  ),
  "half": (functools.partial(sinkhorn, start="gaussian", iterations=0), True, True),
  "sliced": (functools.partial(asap_attention, dual_map=dual_map()), True, True),
  "unsliced": (
    functools.partial(asap_attention, dual_map=dual_map(UNSLICED)), True, True
  ),
  "closures": (
    functools.partial(asap_attention, dual_map=dual_map(UNSLICED).with_closures(2)),
    True, True,
  ),
}  # fmt: skip


def shapes(dtype=jnp.float32, dim=DIM):
  sizes = (N, dim), (M, dim), (M, FEATURES)
  return [jax.ShapeDtypeStruct((BATCH, n, HEADS, d), dtype) for n, d in sizes]


@functools.cache
def text(name, platform, has_slopes, precision=None):
  attend = functools.partial(ATTENTIONS[name][0], precision=precision)

  def run(*tokens):
    def loss(*tokens):
      return jnp.sum(jnp.square(attend(*tokens)))

    return jax.grad(loss, (0, 1, 2))(*tokens) if has_slopes else attend(*tokens)

  return lowered.exported(run, *shapes(), platform=platform)


def loops_wait_for_data_where_they_have_to(name, platform, has_slopes):
  count = lowered.loops_on_data(text(name, platform, has_slopes))
  assert (count == 0) == ATTENTIONS[name][1 + has_slopes]


def no_place_is_looked_up(name, platform, has_slopes):
  if name in ("sinkhorn", "chunked", "gaussian"):
    # Duals are kept iteration by iteration, at places that a loop counts.
    forbidden = "gather", "scatter"
  else:
    forbidden = lowered.LOOK_UPS
  words = text(name, platform, has_slopes)
  assert not [word for word in forbidden if f"stablehlo.{word}" in words]


def of_logits(name, platform, has_slopes, precision=None):
  """Precisions of products that make logits, or go back from them; and of values."""
  logits, values = [], []
  for found, *factors in lowered.products(text(name, platform, has_slopes, precision)):
    sizes = {size for factor in factors for size in factor[-2:]}
    if sizes == {N, M, DIM}:
      logits.append(found)
    elif sizes == {N, M, FEATURES}:
      values.append(found)
  return logits, values


def logits_keep_their_float32(name, platform, has_slopes):
  logits, values = of_logits(name, platform, has_slopes)
  assert len(logits) >= 1 + 2 * has_slopes
  assert all(found == {"HIGHEST"} for found in logits)
  # In gradients of iterations products with values are exact as well.
  assert {"DEFAULT"} in values


# All of a case together: tracing it takes longer than looking.
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize(
  "platform", [pytest.param("cuda", marks=pytest.mark.slow), "tpu"]
)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_what_is_lowered(name, platform, has_slopes):
  loops_wait_for_data_where_they_have_to(name, platform, has_slopes)
  no_place_is_looked_up(name, platform, has_slopes)
  logits_keep_their_float32(name, platform, has_slopes)


@pytest.mark.parametrize("name", ["softmax", "sinkhorn", "chunked", "sliced"])
def test_one_argument_trades_precision(name):
  logits, _ = of_logits(name, "tpu", True, "default")
  assert len(logits) >= 3
  assert all(found == {"DEFAULT"} for found in logits)


@pytest.mark.parametrize(
  ("dtype", "dim", "wanted"),
  [
    (jnp.float32, 16, "HIGHEST"),
    (jnp.bfloat16, 16, "DEFAULT"),  # queries times 1 / 4 are bfloat16 still
    (jnp.bfloat16, DIM, "HIGH"),
    (jnp.float16, 16, "HIGH"),
  ],
)
def test_inputs_of_16_bits_take_what_loses_nothing(dtype, dim, wanted):
  attend = functools.partial(sinkhorn_attention, iterations=1)
  found = lowered.products(
    lowered.exported(attend, *shapes(dtype, dim), platform="tpu")
  )
  logits = [each for each, *_, result in found if result[-2:] == (N, M)]
  assert logits == [{wanted}]
