"""Meshes of explicit axes, as `jax.make_mesh` makes them: equal to one device."""

import pytest
from helpers.lowered import run_on_host_devices

FUNCTIONS = """
  import functools
  import re
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  import asap_jax
  from asap_jax import DualMap, asap_attention, sinkhorn_attention

  kinds = (AxisType.Explicit,) * 2
  mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=kinds)
  by_head = NamedSharding(mesh, P("batch", None, "heads", None))
  by_row = NamedSharding(mesh, P("batch"))

  sinkhorn = functools.partial(sinkhorn_attention, iterations=3)
  keys = jax.random.split(jax.random.key(0), 5)
  sliced = DualMap(
    jax.random.normal(keys[0], (4, 3, 8)),
    0.1 * jax.random.normal(keys[1], (4, 3 + 8 + 2)),
  )
  functions = {
    "softmax": asap_jax.softmax_attention,
    "zero": sinkhorn,
    "gaussian": functools.partial(sinkhorn, start="gaussian"),
    "half": functools.partial(sinkhorn, start="gaussian", iterations=0),
    "relaxed": functools.partial(sinkhorn, relaxation=1.5),
    "tolerance": functools.partial(sinkhorn, tolerance=0.1),
    "chunked": functools.partial(sinkhorn, implementation="chunked"),
    "ott": functools.partial(sinkhorn, implementation="ott"),
    "sliced": functools.partial(asap_attention, dual_map=sliced),
    "closures": functools.partial(asap_attention, dual_map=sliced.with_closures(3)),
    "packed": functools.partial(sinkhorn, max_segments=1, start="gaussian"),
  }
  tokens = [jax.random.normal(key, (8, 6, 4, 8)) for key in keys[2:]]
  placed = [jax.device_put(x, by_head) for x in tokens]
  valid = jnp.arange(6) < jnp.array([6, 5, 4, 3, 2, 6, 1, 5])[:, None]
  mask = nnx.make_attention_mask(valid, valid)
  placed_mask = jax.device_put(mask, by_row)

  def compiled(function, query, key, value, mask):
    def step(query, key, value, mask):
      attend = functools.partial(function, mask=mask)
      out, pull = jax.vjp(attend, query, key, value)
      return out, pull(2.0 * out)

    return jax.jit(step).lower(query, key, value, mask).compile()

  def assert_equal(found, expected, name):
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)

  def collectives(text):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"\\b(?:{names})(?:-start)?\\(", text)

  for name, function in functions.items():
    # Masks take more paths; without them there are others, of few functions.
    without = name in ("zero", "chunked", "sliced")
    for given in ((mask, placed_mask), *[(None, None)] * without):
      expected = compiled(function, *tokens, given[0])(*tokens, given[0])
      with jax.set_mesh(mesh):
        run = compiled(function, *placed, given[1])
        found = run(*placed, given[1])
      assert_equal(found, expected, name)
      assert collectives(run.as_text()) == [], name
      out, slopes = found
      for array in (out, *slopes):
        assert jax.typeof(array).sharding.spec == by_head.spec, (name, array.sharding)

  def sown(x, mask):
    layer = nnx.MultiHeadAttention(
      2, 8, attention_fn=sinkhorn, decode=False, rngs=nnx.Rngs(0)
    )
    look = nnx.capture(
      lambda layer: layer(x, mask=mask, sow_weights=True), nnx.Intermediate
    )
    (weights,) = jax.tree.leaves(look(layer)[1])
    return weights * 2.0

  x = jax.random.normal(keys[0], (8, 6, 8))
  expected = jax.jit(sown)(x, mask)
  with jax.set_mesh(mesh):
    found = jax.jit(sown)(jax.device_put(x, by_row), placed_mask)
  assert_equal(found, expected, "sown")
  assert jax.typeof(found).sharding.spec[0] == "batch"

  def trained():
    return asap_jax.AmortizedMultiHeadAttention(2, 8, rngs=nnx.Rngs(0))

  @nnx.jit
  def step(model, x):
    def loss(model):
      return (model(x) ** 2).mean() + asap_jax.dual_loss(model)

    return nnx.value_and_grad(loss)(model)

  expected = step(trained(), x)
  with jax.set_mesh(mesh):
    found = step(trained(), jax.device_put(x, by_row))
  assert_equal(found, expected, "in the loop")

  print("functions")
"""

MODEL = """
  import tempfile
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  import asap_jax

  class Model(nnx.Module):
    def __init__(self, seed):
      rngs = nnx.Rngs(seed)
      self.attention = asap_jax.SinkhornMultiHeadAttention(2, 8, rngs=rngs)
      self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
      return self.out(self.attention(x))

  tokens = jax.random.normal(jax.random.key(0), (4, 16, 6, 8))
  plain = Model(0)
  recipe = asap_jax.Recipe(slices=2, refine_steps=2)
  expected, _ = asap_jax.compile(plain, tokens, recipe, progress=False)

  mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.KIND,))
  nnx.update(plain, jax.device_put(nnx.state(plain), NamedSharding(mesh, P())))
  by_row = NamedSharding(mesh, P("batch"))
  batches = [jax.device_put(batch, by_row) for batch in tokens]

  def check(name):
    compiled, _ = asap_jax.compile(plain, batches, recipe, progress=False)
    with tempfile.TemporaryDirectory() as folder:
      asap_jax.save(f"{folder}/model", compiled)
      loaded = asap_jax.load(f"{folder}/model", Model(1))
    for model in (compiled, loaded):
      out = model(batches[0])
      assert out.sharding.is_equivalent_to(by_row, out.ndim), out.sharding
      np.testing.assert_allclose(out, expected(tokens[0]), rtol=1e-3, atol=1e-4)
    print(name)

  if "KIND" == "Explicit":
    check("outside")
  with jax.set_mesh(mesh):
    check("inside")
    if "KIND" == "Auto":
      raise SystemExit
    chosen, report = asap_jax.compile(plain, batches, progress=False)
    assert np.isfinite(chosen(batches[0])).all()
"""


@pytest.mark.slow
def test_all_functions_equal_one_device():
  assert run_on_host_devices(8, FUNCTIONS) == ["functions"]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "done"), [("Explicit", ["outside", "inside"]), ("Auto", ["inside"])]
)
def test_models_compile_inside_of_the_mesh_and_outside(kind, done):
  assert run_on_host_devices(8, MODEL.replace("KIND", kind)) == done
