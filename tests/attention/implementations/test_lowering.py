"""What attention is lowered to for platforms that are not at hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import lowered

from asap_jax import DualMap, asap_attention, sinkhorn_attention
from asap_jax.attention.implementations import choice, dispatch
from asap_jax.dual_map.features import COMPILED, feature_count

BATCH, LENGTH, HEADS, DIM, SLICES = 2, 16, 4, 8, 8
RANDOM = np.random.default_rng(0)
DUAL_MAP = DualMap(
  *(
    jnp.asarray(0.1 * RANDOM.normal(size=(HEADS, *shape)), jnp.float32)
    for shape in ((SLICES, DIM), (feature_count(COMPILED, SLICES, DIM),))
  ),
  COMPILED,
)
ATTENTIONS = {
  "asap": functools.partial(asap_attention, dual_map=DUAL_MAP),
  "sinkhorn": functools.partial(sinkhorn_attention, iterations=3),
}
# By these one implementation is told from another.
TELLING = ("dot_general", "exponential", "reduce", "while", "sort")


def tokens(dtype=jnp.float32):
  return (jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, DIM), dtype),) * 3


MASK = jax.ShapeDtypeStruct((BATCH, 1, LENGTH, LENGTH), bool)


def values(attend, *tokens):
  return attend(*tokens)


def slopes(attend, *tokens):
  def loss(query, key, value, mask=None):
    out = attend(query, key, value, mask=mask)
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  return jax.grad(loss, (0, 1, 2))(*tokens)


def operations(of, attend, *arguments, platforms=lowered.ACCELERATORS):
  function = functools.partial(of, attend)
  return lowered.operations(function, *arguments, platforms=platforms)


@pytest.mark.parametrize("masks", [(), (MASK,)], ids=["whole", "masked"])
@pytest.mark.parametrize("of", [values, slopes])
def test_compiled_attention_looks_nothing_up(of, masks):
  def attend(query, key, value, mask=None):
    return ATTENTIONS["asap"](query, key, value, mask=mask)

  for counted in operations(of, attend, *tokens(), *masks).values():
    assert counted["sort"] >= 2  # there and back: the potentials are there
    assert not lowered.found(counted, lowered.LOOK_UPS)


def told(counted):
  return {name: counted[name] for name in TELLING}


@pytest.mark.parametrize("of", [values, slopes])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_choice_is_that_of_the_platform_lowered_for(name, of, monkeypatch):
  # All heads are too many for an accelerator, one by one they are not for a CPU.
  monkeypatch.setattr(choice, "_DENSE", BATCH * HEADS * LENGTH**2 - 1)
  platforms = "cpu", *lowered.ACCELERATORS
  found, xla, chunked = (
    operations(
      of,
      functools.partial(ATTENTIONS[name], implementation=implementation),
      *tokens(),
      platforms=platforms,
    )
    for implementation in (None, "xla", "chunked")
  )
  for platform in platforms:
    wanted, other = (xla, chunked) if platform == "cpu" else (chunked, xla)
    assert told(found[platform]) == told(wanted[platform])
    assert told(found[platform]) != told(other[platform])


@pytest.fixture
def cudnn_on_cuda(monkeypatch):
  """As on a host with cuDNN; its call is a cosine, which no other has."""
  monkeypatch.setattr(
    choice, "_no_cudnn", lambda platform, *_: None if platform == "cuda" else "none"
  )
  monkeypatch.setattr(choice, "_CUDNN_LENGTH", LENGTH)
  monkeypatch.setattr(
    dispatch, "cudnn_attention", lambda query, key, value, *_, **__: jnp.cos(value)
  )


@pytest.mark.usefixtures("cudnn_on_cuda")
@pytest.mark.parametrize("name", ATTENTIONS)
def test_cudnn_is_taken_on_cuda_alone(name):
  platforms = "cpu", *lowered.ACCELERATORS
  arguments = ATTENTIONS[name], *tokens(jnp.bfloat16)
  found = operations(values, *arguments, platforms=platforms)
  taken = {platform for platform in platforms if found[platform]["cosine"]}
  assert taken == {"cuda"}


@pytest.mark.usefixtures("cudnn_on_cuda")
def test_an_export_for_several_platforms_holds_each_ones_own():
  attend = ATTENTIONS["asap"]
  exported = jax.export.export(jax.jit(attend), platforms=("cpu", "cuda"))
  exported = exported(*tokens(jnp.bfloat16))
  assert "stablehlo.cosine" in exported.mlir_module()
  inputs = jnp.asarray(RANDOM.normal(size=(3, *tokens()[0].shape)), jnp.bfloat16)
  if jax.default_backend() == "cpu":
    wanted = jax.jit(functools.partial(attend, implementation="xla"))(*inputs)
    np.testing.assert_array_equal(exported.call(*inputs), wanted)


def test_without_cudnn_at_hand_an_export_for_cuda_is_plain_xla():
  if jax.default_backend() == "gpu":
    pytest.skip("cuDNN is at hand")
  attend = ATTENTIONS["asap"]
  found, wanted = (
    operations(values, functools.partial(attend, implementation=n), *tokens("bfloat16"))
    for n in (None, "xla")
  )
  assert found == wanted
