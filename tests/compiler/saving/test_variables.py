"""What a model may hold beside its attention."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.saved import blank, compiled, value_of

from asap_jax import load, save


def zeros_like(value):
  """Another value of the same kind."""

  def other(leaf):
    if isinstance(leaf, str):
      return "other"
    if type(leaf) in (bool, int, float):
      return type(leaf)(0)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(99, impl=str(jax.random.key_impl(leaf)))
    return leaf * 0

  if isinstance(value, nnx.Variable):
    return type(value)(jax.tree.map(other, value.get_value()))
  return jax.tree.map(other, value)


def same(one, other):
  one, other = (
    each.get_value() if isinstance(each, nnx.Variable) else each
    for each in (one, other)
  )
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert type(a) is type(b)
    if hasattr(a, "dtype"):
      assert a.dtype == b.dtype
      if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def kinds():
  return {
    "raw": jnp.arange(3.0),
    "raw_numpy": np.array([0.1, 0.2]),  # of 64 bits
    "whole": nnx.Variable(3),
    "truth": nnx.Variable(True),
    "fraction": nnx.Variable(0.1),
    "text": nnx.Variable("text"),
    "nothing": nnx.Variable(None),
    "tree": nnx.Variable({"a": jnp.ones(2), "b": None, "c.d": (4, jnp.zeros(1))}),
    "empty": nnx.Param(jnp.zeros((0, 3), jnp.bfloat16)),
    "numpy_number": nnx.Variable(np.float64(0.1)),
    "half": nnx.Param(jnp.full(2, 0.3, jnp.bfloat16)),
    "complex": nnx.Param(jnp.full(2, 1 + 2j)),
    "rng": nnx.Variable(jax.random.key(7, impl="rbg")),
  }


def test_whatever_a_variable_holds_survives(tmp_path):
  save(tmp_path / "model", compiled(**kinds()))
  others = {name: zeros_like(value) for name, value in kinds().items()}
  loaded = load(tmp_path / "model", blank(**others))
  for name, value in kinds().items():
    same(getattr(loaded, name), value)


def test_an_abstract_blank_has_no_numbers_and_takes_them(tmp_path):
  wanted = kinds()
  del wanted["text"]  # what eval_shape does not take
  save(tmp_path / "model", compiled(**wanted))

  def build():
    own = kinds()
    del own["text"]
    return blank(**own)

  loaded = load(tmp_path / "model", nnx.eval_shape(build))
  for name, value in wanted.items():
    same(getattr(loaded, name), value)


def nested(scale):
  return {
    "a": nnx.Dict({"b": nnx.Param(jnp.full(2, scale)), "c/d": nnx.Param(jnp.ones(1))}),
    "rest": nnx.Dict(
      {
        "a.b": nnx.Param(jnp.full(2, 2 * scale)),
        "a": nnx.Dict(b=nnx.Param(jnp.ones(2))),
      }
    ),
  }


def test_names_with_dots_are_told_apart(tmp_path):
  save(tmp_path / "model", compiled(**nested(3.0)))
  loaded = load(tmp_path / "model", blank(**nested(0.0)))
  np.testing.assert_array_equal(loaded.a["b"][...], 3.0)
  np.testing.assert_array_equal(loaded.rest["a.b"][...], 6.0)
  np.testing.assert_array_equal(loaded.rest["a"]["b"][...], 1.0)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
  def __init__(self, one, other):
    self.both = one, other

  def tree_flatten_with_keys(self):
    key = jax.tree_util.GetAttrKey("twin")
    return [(key, each) for each in self.both], None

  @classmethod
  def tree_unflatten(cls, _, children):
    return cls(*children)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (nnx.Variable(Twins(jnp.ones(1), jnp.zeros(1))), "the name own.twin"),
    (nnx.Variable(b"bytes"), "model holds a bytes at own: expected"),
    (nnx.Variable(np.array(["a"])), "model holds an array of <U1 at own: expected"),
  ],
  ids=["one name", "bytes", "texts"],
)
def test_what_cannot_be_saved_is_named(tmp_path, value, message):
  with pytest.raises(ValueError, match=message):
    save(tmp_path / "model", compiled(own=value))
  assert not list(tmp_path.iterdir())


def test_a_model_without_values_is_refused(tmp_path, unchecked):
  for model in (nnx.eval_shape(compiled), {"attend": compiled().attend}):
    with pytest.raises(ValueError, match="model "):
      save(tmp_path / "model", model)
  with pytest.raises(ValueError, match=r"model is a builtins.dict"):
    load(tmp_path / "model", {})


def test_modes_are_those_that_were_saved(tmp_path):
  def layers():
    rngs = nnx.Rngs(0)
    norm, drop = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    return {"norm": norm, "drop": drop}

  model = compiled(**layers())
  model.eval()
  model.drop.deterministic = False  # as for Monte Carlo
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", blank(**layers()))
  assert (loaded.norm.use_running_average, loaded.drop.deterministic) == (True, False)
  assert nnx.graphdef(loaded) == nnx.graphdef(model)


def test_what_needs_64_bits_says_so(tmp_path):
  with jax.enable_x64(True):
    model = compiled(np.float64(0.1), wide=nnx.Param(jnp.full(1, 0.1)))
    assert model.wide.dtype == jnp.float64
    save(tmp_path / "model", model)
    loaded = load(tmp_path / "model", blank(wide=nnx.Param(jnp.zeros(1))))
    assert loaded.wide[0] == model.wide[0]
    assert value_of(loaded) == 0.1
  with pytest.raises(ValueError, match=r"64 bits .*, wide.*: expected jax_enable"):
    load(tmp_path / "model", blank(wide=nnx.Param(jnp.zeros(1))))


def test_the_manifest_is_plain_json(tmp_path):
  save(tmp_path / "model", compiled(low=nnx.Variable(float("-inf"))))
  manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
  assert manifest["format"] == 3
  assert manifest["versions"]["jax"] == jax.__version__
  loaded = load(tmp_path / "model", blank(low=nnx.Variable(0.0)))
  assert loaded.low.get_value() == float("-inf")
