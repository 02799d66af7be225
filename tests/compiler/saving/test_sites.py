"""What is known of the places of a compiled model, and where they are found again."""

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models
from helpers.lowered import run_on_host_devices
from helpers.saved import Holder, blank, compiled, value_of

import asap_jax
from asap_jax import load, save
from asap_jax.compiler import keep_record, record_of, records_of
from asap_jax.compiler.saving import options
from asap_jax.compiler.saving.names import Names


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("compiled") / "model"
  save(path, models.compiled().model)
  return path


def test_a_saved_model_tells_how_it_was_compiled(saved):
  manifest = json.loads((saved / "manifest.json").read_text())
  model, report = models.compiled()
  versions = {"asap_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy"}
  assert manifest["versions"].keys() >= versions
  for site, layer in zip(manifest["sites"], report.layers, strict=True):
    record = site["record"]
    assert record["teacher"]["iterations"] == models.ITERATIONS
    assert record["device"] == "cpu"
    # Of 6 batches of 16 every fifth, from the second on, is held out.
    assert record["calibration"] == {"fitted": 80, "held_out": 16}
    (own,) = record["layers"]
    assert own["name"] == layer.name
    np.testing.assert_array_equal(own["tv"], layer.tv)
    np.testing.assert_array_equal(own["column_error"], layer.column_error)
  loaded = load(saved, models.toy(3))
  assert records_of(loaded) == records_of(model)
  assert nnx.graphdef(loaded) == nnx.graphdef(model)


@pytest.mark.parametrize(
  ("bound", "said"),
  [
    ({"iterations": 3}, "iterations=3, compiled from 5"),
    ({"start": "gaussian"}, "start=gaussian, compiled from zero"),
    ({"implementation": "ott"}, None),  # the same plan
  ],
)
def test_another_teacher_than_the_compiled_one_is_told(saved, bound, said):
  model = models.toy(3)
  held = model.blocks[0].attention
  held.attention_fn = functools.partial(held.attention_fn, **bound)
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    loaded = load(saved, model)
  texts = [str(each.message) for each in found if "teacher" in str(each.message)]
  assert len(texts) == (said is not None)
  assert said is None or said in texts[0]
  models.assert_same_state(loaded, models.compiled().model)


def test_what_stands_beside_a_map_survives(tmp_path):
  model = compiled(2.0)
  model.attend.thresholds = nnx.Dict(rows=nnx.Variable(jnp.asarray([0.1, 0.2])))
  model.attend.level = nnx.Variable(jnp.asarray(3.0))
  keep_record(model.attend, {"monitor": {"quantile": 0.99}})
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", nnx.eval_shape(blank))
  models.assert_same_state(loaded, model)
  assert nnx.graphdef(loaded) == nnx.graphdef(model)
  assert record_of(loaded.attend) == {"monitor": {"quantile": 0.99}}


def test_beside_a_map_only_known_kinds_are_saved(tmp_path):
  class Own(nnx.Variable):
    pass

  model = compiled()
  model.attend.own = Own(jnp.ones(1))
  with pytest.raises(ValueError, match=r"holds a Own at own .*expected an array"):
    save(tmp_path / "model", model)


def test_a_compiled_model_is_no_blank(saved):
  with pytest.raises(ValueError, match="model is compiled already"):
    load(saved, models.compiled().model)


class Stem(nnx.Module):
  def __init__(self, name, inner, head, scale=0.0):
    attend = compiled(scale).attend if scale else asap_jax.sinkhorn_attention
    setattr(self, name, nnx.List([Holder(attend, **{inner: nnx.Linear(1, 1, rngs=R)})]))
    setattr(self, head, nnx.Param(jnp.full(2, scale)))


R = nnx.Rngs(0)


def test_renamed_attributes_are_mapped(tmp_path):
  model = Stem("blocks", "fc", "head", 2.0)
  save(tmp_path / "model", model)
  now = Stem("layers", "mlp", "out")
  with pytest.raises(ValueError, match=r"none at blocks.0.attend, .*pass names="):
    load(tmp_path / "model", now)
  names = {"blocks": "layers", "blocks.0.fc": "layers.0.mlp", "head": "out"}
  loaded = load(tmp_path / "model", now, names=names)
  assert value_of(loaded.layers[0]) == 2.0
  np.testing.assert_array_equal(loaded.out[...], 2.0)
  same = loaded.layers[0].mlp.kernel[...], model.blocks[0].fc.kernel[...]
  np.testing.assert_array_equal(*same)
  with pytest.raises(ValueError, match="names: the saved model has nothing at tail"):
    load(tmp_path / "model", now, names={**names, "tail": "end"})
  with pytest.raises(ValueError, match=r"head: saved float32\[2\], model nothing"):
    load(tmp_path / "model", now, names={k: names[k] for k in names if k != "head"})


def test_names_change_whole_parts_only():
  names = Names({"a": "b"})
  assert names.now(["ab", "a"]) == ("ab", "a")
  assert names.now(["a", "a"]) == ("b", "a")


@pytest.mark.parametrize(
  ("bound", "saved_as", "written", "count"),
  [
    ({"epsilon": np.float64(0.5)}, {"epsilon": 0.5}, 3, 0),
    ({}, {"epsilon": 1.0}, 3, 0),  # the default
    ({"epsilon": 1.0}, {}, 3, 0),
    ({"epsilon": 0.5}, {"epsilon": 0.25}, 3, 1),
    ({"scale": 0.5}, {}, 3, 1),
    ({"dtype": jnp.float32}, {"dtype": {"dtype": "float32"}}, 3, 0),
    ({"dtype": "float32"}, {"dtype": {"dtype": "float32"}}, 3, 0),
    ({"dtype": jnp.float32}, {"dtype": {"dtype": "bfloat16"}}, 3, 1),
    ({"precision": "highest"}, {"precision": {"enum": "Precision.HIGHEST"}}, 3, 0),
    ({"epsilon": 0.5}, {"epsilon": "np.float64(0.5)"}, 2, 0),
    ({"epsilon": np.float32(0.5)}, {"epsilon": "0.5"}, 2, 0),
    ({"epsilon": 0.5}, {"epsilon": "0.25"}, 2, 1),
    ({"dtype": jnp.bfloat16}, {"dtype": repr(jnp.bfloat16)}, 2, 0),
  ],
)
def test_options_are_compared_by_value(bound, saved_as, written, count):
  assert len(options.differences(bound, saved_as, written)) == count


def test_options_equal_by_value_load(tmp_path):
  model = compiled(2.0)
  model.attend = asap_jax.AsapAttention(model.attend.dual_map, {"epsilon": 0.5})
  save(tmp_path / "model", model)
  for value, loads in ((np.float64(0.5), True), (0.25, False)):
    bound = functools.partial(asap_jax.sinkhorn_attention, epsilon=value)
    if loads:
      assert value_of(load(tmp_path / "model", Holder(bound))) == 2.0
    else:
      with pytest.raises(ValueError, match=r"attend: epsilon=0.25, saved was 0.5"):
        load(tmp_path / "model", Holder(bound))


ELSEWHERE = """
  import sys
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.sharding import NamedSharding, PartitionSpec as P
  from asap_jax import load, save
  from helpers.saved import blank, compiled

  folder = {folder!r}
  mesh = jax.make_mesh((8,), ("data",))
  spread = NamedSharding(mesh, P("data"))

  def param(scale, sharding):
    return nnx.Param(jax.device_put(jnp.arange(8.0) * scale, sharding))

  save(folder + "/spread", compiled(2.0, own=param(1, spread)))
  third = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  model = compiled(3.0, own=param(1, third))
  nnx.update(model, jax.device_put(nnx.state(model), third))
  save(folder + "/third", model)

  other = NamedSharding(jax.make_mesh((2,), ("model",), devices=jax.devices()[4:6]),
    P("model"))
  for asked in (other, third, spread):
    for name in ("spread", "third"):
      loaded = load(folder + "/" + name, blank(own=param(0, asked)))
      assert loaded.own.sharding.is_equivalent_to(asked, 1), loaded.own.sharding
      assert (loaded.own[...] == jnp.arange(8.0)).all()
  loaded = load(folder + "/third", blank(own=nnx.Param(jnp.zeros(8))))
  joined = loaded.own[...] + param(1, spread)[...]  # free to join others
  assert (joined == 2 * jnp.arange(8.0)).all()
  print("written")
"""


def test_what_was_saved_on_other_devices_loads_here(tmp_path):
  assert run_on_host_devices(8, ELSEWHERE.format(folder=str(tmp_path))) == ["written"]
  for name, value in (("spread", 2.0), ("third", 3.0)):
    loaded = load(tmp_path / name, blank(own=nnx.Param(jnp.zeros(8))))
    assert value_of(loaded) == value
    assert loaded.own.devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(loaded.own[...], np.arange(8.0))
