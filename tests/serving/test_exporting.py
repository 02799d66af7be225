"""Models as StableHLO, and processes that have nothing but JAX."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.served import TOKENS, WIDTH, encoder, expected, padded, tokens

import asap_jax
from asap_jax import export
from asap_jax.serving import files

# Shapes in annotations are of numbers alone.
pytestmark = pytest.mark.usefixtures("unchecked")


def of(content):
  return jax.export.deserialize(content)


@functools.cache
def exported():
  """A compiled model of padded batches of any size."""
  return export(encoder(), padded(), platforms=("cpu",))


ALONE = """
  import sys

  for name in ("asap_jax", "flax", "ott", "orbax"):
    sys.modules[name] = None  # importing it is an error
  import jax
  import numpy as np

  served = jax.export.deserialize(bytearray(open("model.bin", "rb").read()))
  given = np.load("given.npz")
  np.save("out.npy", served.call(given["x"], given["valid"]))
"""


def test_a_process_with_jax_alone_gives_the_same_bits(tmp_path):
  (tmp_path / "model.bin").write_bytes(exported())
  x, valid = padded(3)
  np.savez(tmp_path / "given.npz", x=x, valid=valid)
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(ALONE)],
    cwd=tmp_path,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    check=True,
  )
  out = np.load(tmp_path / "out.npy")
  np.testing.assert_array_equal(out, of(exported()).call(x, valid))
  np.testing.assert_allclose(out, expected(encoder(), x, valid), atol=2e-6)


def test_known_sizes_give_the_bits_of_the_model():
  content = export(encoder(), padded(), platforms=("cpu",), symbolic=None)
  out = of(content).call(*padded())
  model = nnx.clone(encoder())
  model.eval()
  wanted = jax.jit(lambda *inputs: model(*inputs))(*padded())  # weights as constants
  np.testing.assert_array_equal(out, wanted)


def test_padding_changes_nothing():
  x, valid = padded()
  other = jnp.where(valid[..., None], x, 7.0)
  one, two = (of(exported()).call(each, valid) for each in (x, other))
  np.testing.assert_array_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", ["b, ...", "b, n, ..."])
def test_a_teacher_for_all_platforms(symbolic):
  model, (x, valid) = encoder("teacher"), padded()
  served = of(export(model, (x, valid), symbolic=symbolic))
  assert served.platforms == ("cpu", "cuda", "tpu")
  for given in ((x, valid), (x[:1], valid[:1]), (x[1:, :5], valid[1:, :5])):
    if "n" in symbolic or given[0].shape[1] == TOKENS:
      wanted = expected(model, *given)
      np.testing.assert_allclose(served.call(*given), wanted, atol=2e-6)


def test_evaluation_mode_is_exported_and_the_model_keeps_its_own():
  model = nnx.Sequential(
    nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1))
  )
  x = jnp.arange(12.0).reshape(3, 4)
  before = nnx.state(model)
  served = of(export(model, x, platforms=("cpu",)))
  assert not model.layers[0].deterministic
  np.testing.assert_allclose(served.call(x), x, rtol=1e-4)  # running mean 0, variance 1
  jax.tree.map(np.testing.assert_array_equal, *map(_data, (before, nnx.state(model))))


def _data(state):
  return [
    jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x in jax.tree.leaves(state)
  ]


def test_functions_are_exported_as_they_are():
  module = nn.Dense(3)
  x = jnp.ones((2, 4))
  variables = module.init(jax.random.key(0), x)
  served = of(export(functools.partial(module.apply, variables), x, platforms=("cpu",)))
  np.testing.assert_array_equal(served.call(x[:1]), module.apply(variables, x[:1]))


def plain(x):
  return x + 1.0


def test_files_are_whole_and_not_overwritten_unless_asked(tmp_path, monkeypatch):
  path, x = tmp_path / "new" / "model.bin", jnp.ones((2, 3))
  content = export(plain, x, path, platforms=("cpu",))
  assert path.read_bytes() == content
  with pytest.raises(FileExistsError, match="overwrite=True"):
    export(plain, x, path)
  with pytest.raises(FileExistsError, match="is a directory"):
    export(plain, x, tmp_path, overwrite=True)
  other = export(lambda x: x - 1.0, x, path, platforms=("cpu",), overwrite=True)
  assert path.read_bytes() == other != content

  def killed(*_):
    raise OSError("no space")

  monkeypatch.setattr(files.os, "fsync", killed)
  with pytest.raises(OSError, match="no space"):
    export(plain, x, path, platforms=("cpu",), overwrite=True)
  assert [each.name for each in path.parent.iterdir()] == ["model.bin"]
  assert path.read_bytes() == other


@pytest.mark.parametrize(
  ("wrong", "said"),
  [
    ({"model": nn.Dense(3)}, "Linen module Dense"),
    ({"model": 3}, "model is a int"),
    ({"example_inputs": "x"}, r"example_inputs\[0\] is a str"),
    ({"platforms": "cpu"}, "platforms='cpu'"),
    ({"platforms": ("gpu",)}, "expected some of cpu, cuda, tpu"),
    ({"platforms": ()}, r"platforms=\(\)"),
    ({"symbolic": "b"}, "symbolic='b'"),
    ({"symbolic": "b, ?"}, r"symbolic='b, \?'"),
    ({"symbolic": "b, b"}, "b is 2 in one"),
    ({"symbolic": None, "constraints": ("b >= 2",)}, "symbolic=None"),
    ({"constraints": ("b",)}, r"constraints=\('b',\)"),
  ],
)
def test_bad_arguments_are_named_before_tracing(wrong, said):
  def never(x):
    raise AssertionError("traced")

  given = {"model": never, "example_inputs": jnp.ones((2, 3)), **wrong}
  with pytest.raises(ValueError, match=said):
    export(**given)


def test_a_size_that_the_model_knows_cannot_be_open():
  with pytest.raises(ValueError, match="symbolic='b, n, c': the model does not take"):
    export(encoder(), tokens(), symbolic="b, n, c")


def test_faults_of_the_model_are_its_own():
  with pytest.raises((TypeError, ValueError), match=r"(?i)incompatible shapes"):
    export(lambda x: x + jnp.ones(5), jnp.ones((2, 3)))


def test_a_kernel_of_one_platform_is_refused_before_tracing():
  class Never(nnx.Module):
    def __init__(self):
      self.attend = functools.partial(
        asap_jax.sinkhorn_attention, implementation="cudnn"
      )

    def __call__(self, x):
      raise AssertionError("traced")

  with pytest.raises(ValueError, match="attend has implementation='cudnn'"):
    export(Never(), jnp.ones((2, TOKENS, WIDTH)))
