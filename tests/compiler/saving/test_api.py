import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models
from helpers.pages import ROOT

import asap_jax
from asap_jax import AsapAttention, DualMap, load, save, sinkhorn_attention
from asap_jax.compiler.saving import restoring
from asap_jax.compiler.sites import find_sinkhorn, replace_sites

DIM = models.WIDTH // models.HEADS
X = models.batches()[0][:2]


def compiled(seed=0, features=("potentials", "cumulants"), **options):
  """A toy model with dual maps of random values: faster than to calibrate one."""
  model = models.toy(seed, **options)
  random = np.random.default_rng(seed)
  dim = model.blocks[0].attention.head_dim

  def values(*shape):
    return jnp.asarray(random.normal(size=shape), jnp.float32)

  sites = find_sinkhorn(model)
  size = sum({"potentials": 3, "query": dim, "cumulants": 2}[kind] for kind in features)
  return replace_sites(
    model,
    sites,
    [
      AsapAttention(
        DualMap(values(models.HEADS, 3, dim), values(models.HEADS, size), features),
        site.options,
      )
      for site in sites
    ],
  )


def assert_same_output(one, other):
  # One compiled program for both, if they are equal: not a bit may differ.
  np.testing.assert_array_equal(models.forward(one, X), models.forward(other, X))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("artifact") / "model"
  save(path, compiled())
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def contents(directory):
  return {
    file.relative_to(directory): file.read_bytes()
    for file in directory.rglob("*")
    if file.is_file()
  }


@pytest.mark.parametrize(
  ("options", "abstract"),
  [
    ({}, False),
    ({"param_dtype": jnp.bfloat16, "dropout_rate": 0.5, "epsilon": 0.5}, True),
    ({"features": ("query",)}, True),
  ],
  ids=["plain", "half precision and dropout", "other features"],
)
def test_loaded_model_is_equal_to_the_last_bit(tmp_path, options, abstract):
  model = compiled(seed=1, **options)
  save(tmp_path / "model", model)
  assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
  own = {name: value for name, value in options.items() if name != "features"}
  build = functools.partial(models.toy, 2, **own)  # of other values
  blank = nnx.eval_shape(build) if abstract else build()
  loaded = load(tmp_path / "model", blank)
  models.assert_same_state(loaded, model)
  assert nnx.graphdef(loaded) == nnx.graphdef(model)
  for training in (False, True):  # dropout draws the same weights
    for each in (loaded, model):
      each.train() if training else each.eval()
    assert_same_output(loaded, model)
  assert len(find_sinkhorn(blank)) == 2  # it stays as it was
  if not abstract:
    models.assert_same_state(blank, build())


def test_calibrated_model_survives(tmp_path):
  save(str(tmp_path / "new" / "model"), models.compiled().model)
  loaded = load(str(tmp_path / "new" / "model"), models.toy(3))
  assert_same_output(loaded, models.compiled().model)


@pytest.mark.parametrize("bound", ["dtype", "precision"])
def test_options_of_the_teacher_survive(tmp_path, bound):
  value = {"dtype": jnp.bfloat16, "precision": jax.lax.Precision.HIGHEST}[bound]

  def build():
    model = models.toy(depth=1)
    attention = model.blocks[0].attention
    attention.attention_fn = functools.partial(attention.attention_fn, **{bound: value})
    return model

  model = build()
  (site,) = find_sinkhorn(model)
  dual_map = DualMap(jnp.ones((2, 1, DIM)), jnp.ones((2, 1)), ("potentials",))
  model = replace_sites(model, [site], [AsapAttention(dual_map, site.options)])
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", build())
  assert_same_output(loaded, model)


def test_model_cast_to_half_precision_survives(tmp_path):
  def cast(model):
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))

  model = cast(compiled())
  save(tmp_path / "model", model)
  models.assert_same_state(load(tmp_path / "model", cast(models.toy())), model)


def test_saved_files_hold_no_code(saved):
  files = contents(saved)
  assert files.keys() >= {pathlib.Path("manifest.json")}
  for name, data in files.items():
    assert name.suffix not in (".pkl", ".pickle", ".py", ".npy"), name
    # The first two bytes of a pickle of protocol 2 or later.
    assert not (data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05"), name


def test_sinkhorn_that_was_chosen_survives(tmp_path):
  teacher = models.toy()
  sites = find_sinkhorn(teacher)
  cut = functools.partial(
    sinkhorn_attention, iterations=2, implementation="xla", **sites[0].options
  )
  held = compiled().blocks[1].attention.attention_fn
  model = replace_sites(teacher, sites, [cut, held])
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", models.toy())
  (site,) = find_sinkhorn(loaded)
  assert (site.iterations, site.teacher.implementation) == (2, "xla")
  assert_same_output(loaded, model)


@pytest.mark.parametrize(
  ("side", "half", "count"), [("key", True, 0), ("key", False, 3), ("query", False, 3)]
)
def test_side_and_momentum_of_a_map_survive(tmp_path, side, half, count):
  model = compiled(depth=1)
  (layer,) = (block.attention for block in model.blocks)
  held = layer.attention_fn
  dual_map = dataclasses.replace(held.dual_map, side=side, half=half)
  if count:
    factors = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2)), jnp.float32)
    dual_map = dataclasses.replace(
      dual_map, relaxation=1.0 + 0.2 * factors, momentum=factors
    )
  layer.attention_fn = AsapAttention(dual_map, dict(held.options))
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", models.toy(1, depth=1))
  back = loaded.blocks[0].attention.attention_fn.dual_map
  assert (back.side, back.half, back.closures) == (side, half, count)
  assert nnx.graphdef(loaded) == nnx.graphdef(model)
  assert_same_output(loaded, model)


@pytest.mark.parametrize("own", [{"relaxation": 1.5}, {"tolerance": 0.05}])
def test_sinkhorn_with_its_start_and_options_survives(tmp_path, own):
  teacher = models.toy()
  sites = find_sinkhorn(teacher)
  plain = {"relaxation": 1.0, "tolerance": None}
  named = {"iterations": 2, "implementation": "xla", "start": "gaussian_diagonal"}
  chosen = plain | named | own
  cut = functools.partial(sinkhorn_attention, **chosen, **sites[0].options)
  held = compiled().blocks[1].attention.attention_fn
  model = replace_sites(teacher, sites, [cut, held])
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", models.toy())
  (site,) = find_sinkhorn(loaded)
  assert dataclasses.asdict(site.teacher) == chosen
  assert_same_output(loaded, model)


def test_a_model_saved_before_its_code_moved_loads():
  """Written by the package when all its modules stood in one folder."""
  folder = ROOT / "tests" / "fixtures" / "compiled_before_rooms"

  def build():
    first, second = (
      asap_jax.SinkhornMultiHeadAttention(
        2, 8, iterations=4, epsilon=epsilon, rngs=nnx.Rngs(0)
      )
      for epsilon in (0.5, 1.0)
    )
    return nnx.Sequential(first, second, nnx.Dropout(0.1, rngs=nnx.Rngs(2)))

  loaded = load(folder / "compiled", nnx.eval_shape(build))
  loaded.eval()
  held = loaded.layers[0].attention_fn
  assert held.dual_map.closures == 2
  assert held.dual_map.network is not None
  assert find_sinkhorn(loaded)[0].teacher.implementation == "xla"
  calls = np.load(folder / "calls.npz")
  np.testing.assert_allclose(loaded(calls["inputs"]), calls["outputs"], atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "xla", "ott"])
def test_uncompiled_model_is_refused(tmp_path, implementation):
  with pytest.raises(ValueError, match=r"holds no compiled attention"):
    save(tmp_path / "model", models.toy(implementation=implementation))
  assert list(tmp_path.iterdir()) == []


def test_existing_model_is_replaced_only_on_request(copy):
  before, other = contents(copy), compiled(seed=5)
  with pytest.raises(FileExistsError, match=r"pass overwrite=True"):
    save(copy, other)
  assert contents(copy) == before
  save(copy, other, overwrite=True)
  models.assert_same_state(load(copy, models.toy()), other)
  assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]


def test_what_is_not_a_saved_model_is_never_replaced(tmp_path):
  directory, file = tmp_path / "directory", tmp_path / "file"
  directory.mkdir()
  for precious in (directory / "thesis.txt", file):
    precious.write_text("precious")
  before = contents(tmp_path)
  for path in (directory, file):
    with pytest.raises(FileExistsError, match=r"not a saved model"):
      save(path, compiled(), overwrite=True)
  assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_while_saving_leaves_nothing_behind(copy, monkeypatch, overwrite):
  before = contents(copy)

  def fail(*args, **kwargs):
    raise OSError("disk full")

  monkeypatch.setattr(pathlib.Path, "write_text", fail)
  path = copy if overwrite else copy.parent / "new"
  with pytest.raises(OSError, match=r"disk full"):
    save(path, compiled(seed=5), overwrite=overwrite)
  assert [entry.name for entry in copy.parent.iterdir()] == ["copy"]
  assert contents(copy) == before


def largest(directory):
  files = (file for file in directory.glob("v-*/arrays/**/*") if file.is_file())
  return max(files, key=lambda file: file.stat().st_size)


def damage(directory, kind):
  manifest = directory / "manifest.json"
  if kind == "array truncated":
    largest(directory).write_bytes(largest(directory).read_bytes()[:-7])
  elif kind == "array deleted":
    largest(directory).unlink()
  elif kind == "byte altered":
    data = bytearray(largest(directory).read_bytes())
    data[len(data) // 2] ^= 1
    largest(directory).write_bytes(data)
  elif kind == "manifest truncated":
    manifest.write_text(manifest.read_text()[:-20])
  elif kind == "manifest not text":
    manifest.write_bytes(b"\xff" + manifest.read_bytes())
  else:
    content = json.loads(manifest.read_text())
    if kind == "format":
      content["format"] = 99
    elif kind == "sites absent":
      del content["sites"]
    elif kind == "options altered":
      content["sites"][0]["options"]["epsilon"] = 2.0
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("array truncated", "truncated, altered or absent: arrays/"),
    ("array deleted", "truncated, altered or absent: arrays/"),
    ("byte altered", "truncated, altered or absent: arrays/"),
    ("manifest truncated", "manifest.json is truncated or altered"),
    ("manifest not text", "manifest.json is truncated or altered"),
    ("sites absent", "manifest.json is truncated or altered"),
    ("options altered", "truncated or altered"),
    (
      "format",
      "format 99, written by asap_jax 0.1.0: this version.* update asap_jax here",
    ),
  ],
)
def test_damaged_files_are_refused(copy, kind, message):
  damage(copy, kind)
  with pytest.raises(ValueError, match=message):
    load(copy, models.toy())


def test_absent_path_is_refused(tmp_path):
  for path in (tmp_path / "nothing", tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved model"):
      load(path, models.toy())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"width": 32}, "another structure.*blocks.0.attention.*saved"),
    ({"depth": 1}, "elsewhere.*none at blocks.1.attention.attention_fn, and more at -"),
    ({"param_dtype": jnp.bfloat16}, "another structure.*bfloat16"),
    ({"use_bias": False}, "another structure.*bias.*nothing"),
  ],
)
def test_model_of_another_structure_is_refused(saved, options, message):
  with pytest.raises(ValueError, match=message):
    load(saved, models.toy(**options))


@pytest.mark.slow
def test_intermediates_are_not_saved(tmp_path):
  model = compiled()
  expected = model(X)
  model.blocks[0].attention.sown = nnx.Intermediate((jnp.ones(3),))
  save(tmp_path / "model", model)
  loaded = load(tmp_path / "model", models.toy(1))
  np.testing.assert_array_equal(loaded(X), expected)


def test_a_model_from_another_kind_of_device_is_loaded_with_a_warning(
  saved, monkeypatch, recwarn
):
  load(saved, models.toy())
  assert not [w for w in recwarn if "was compiled on" in str(w.message)]
  monkeypatch.setattr(restoring, "device_kind", lambda: "TPU v5 lite")
  with pytest.warns(UserWarning, match="was compiled on cpu, and this is TPU v5 lite"):
    restored = load(saved, models.toy())
  models.assert_same_state(restored, compiled())
