"""Which implementation is taken, and why one that is named cannot serve."""

import jax
import jax.numpy as jnp
import pytest

from asap_jax.attention.implementations import choice
from asap_jax.attention.implementations.choice import choose


def chosen(n, m, heads=2, dim=64, dtype=jnp.bfloat16, name=None, **options):
  """The choice for `[1, heads, n or m, dim]`, which are traced and never made."""
  names = []

  def trace(*inputs):
    names.append(choose(name, *inputs, **options))

  shapes = [jax.ShapeDtypeStruct((1, heads, size, dim), dtype) for size in (n, m, m)]
  jax.eval_shape(trace, *shapes)
  return names[0]


def test_choice_on_a_cpu():
  assert chosen(1024, 1024) == "xla"
  # Heads come one after another: their number does not matter, but for a bias.
  assert chosen(2**13, 2**13, heads=64) == "xla"
  assert chosen(2**13, 2**13, heads=8, bias=jnp.zeros(())) == "chunked"
  assert chosen(2**13, 2**13 + 8) == "chunked"
  assert choose(None, *(jnp.zeros((1, 2, 8, 4)),) * 3) == "xla"


@pytest.mark.usefixtures("on_gpu")
def test_choice_on_a_gpu():
  assert chosen(1024, 512) == "cudnn"
  assert chosen(1024, 512, dtype=jnp.float16) == "cudnn"
  # Too short, and what cuDNN does not take.
  assert chosen(64, 512) == "xla"
  assert chosen(1024, 512, dtype=jnp.float32) == "xla"
  assert chosen(1024, 512, bias=jnp.zeros(())) == "xla"
  assert chosen(1024, 512, scale=0.0) == "xla"
  # Many iterations of one kernel pay later.
  assert chosen(1024, 512, count=20) == "xla"
  assert chosen(1024, 1024, count=20) == "cudnn"
  assert chosen(2**14, 2**14, heads=1, dtype=jnp.float32) == "xla"
  assert chosen(2**14, 2**14, heads=2, dtype=jnp.float32) == "chunked"


@pytest.mark.usefixtures("on_gpu")
def test_a_named_implementation_is_what_runs():
  for name in ("xla", "chunked", "cudnn"):
    assert chosen(512, 512, name=name) == name


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, "the device is a cpu.*'chunked' or 'xla'"),
    ({"dtype": jnp.float32}, "query, .* float32: .*bfloat16.*implementation='chunked'"),
    ({"bias": jnp.zeros(())}, "bias.*expected None.*implementation='chunked'"),
    ({"scale": 0.0}, "scale=0.0.*not zero"),
  ],
)
def test_cudnn_that_cannot_serve_says_why(arguments, message):
  if not arguments and jax.default_backend() != "cpu":
    pytest.skip("another device")
  with pytest.raises(
    ValueError, match=f"implementation='cudnn' cannot serve: {message}"
  ):
    chosen(512, 512, name="cudnn", **arguments)


def test_reasons_of_jax_are_passed_on(monkeypatch):
  monkeypatch.setattr(choice, "_platform", lambda array: "gpu")

  def refuse(*inputs, scale):
    assert inputs[0].shape[-1] == 264  # 256 and the columns of the bias
    raise NotImplementedError("the head dim must be <= 256")

  monkeypatch.setattr(choice, "fused_attention", refuse)
  choice._no_cudnn.cache_clear()
  with pytest.raises(ValueError, match=r"head dimension 264.*must be <= 256.*chunked"):
    chosen(512, 512, dim=256, name="cudnn")
  assert chosen(512, 512, dim=256) == "xla"
  choice._no_cudnn.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_cudnn_is_chosen_on_a_gpu():
  assert chosen(512, 512) == "cudnn"
