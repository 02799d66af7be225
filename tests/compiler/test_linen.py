"""Linen modules as people write them: what is compiled, and what is refused."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import core, nnx
from flax import linen as nn

import asap_jax
from asap_jax import sinkhorn_attention
from asap_jax.compiler import CompiledModule, Sinkhorn, linen
from asap_jax.compiler.operators import Asap

HEADS, WIDTH, TOKENS, SIZE = 2, 16, 6, 4
TEACHER = functools.partial(sinkhorn_attention, iterations=2, epsilon=0.5)
CUT = functools.partial(sinkhorn_attention, iterations=1, epsilon=0.5)
# Without slices, whose sorting takes long to compile.
PLAIN = asap_jax.Recipe(
  features=("query", "cumulants"), directions="gaussian", refine_steps=0
)
BATCHES = jnp.asarray(
  np.random.default_rng(0).normal(size=(3, SIZE, TOKENS, WIDTH)), jnp.float32
)
VALID = jnp.arange(TOKENS) < jnp.array([[6], [4], [5], [3]])
MASK = nn.make_attention_mask(VALID, VALID)
SHARED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def flax_layer(attend, **options):
  # Logits large enough for one iteration not to be nearly converged.
  init = nn.initializers.normal(1.7 / WIDTH**0.5)
  return nn.MultiHeadDotProductAttention(
    HEADS, attention_fn=attend, kernel_init=init, **options
  )


class Block(nn.Module):
  attend: object = TEACHER

  @nn.compact
  def __call__(self, x, mask=None):
    return x + 0.2 * flax_layer(self.attend)(x, mask=mask)


class Step(Block):
  @nn.compact
  def __call__(self, x, mask=None):
    return x + 0.2 * flax_layer(self.attend)(x, mask=mask), None


class ByHand(nn.Module):
  """Calls attention itself, twice, in a method that makes no modules."""

  attend: object = TEACHER

  def setup(self):
    self.project = nn.Dense(3 * WIDTH)

  def heads(self, x):
    tokens = jnp.split(2.0 * self.project(x), 3, -1)
    return [y.reshape(*y.shape[:-1], HEADS, WIDTH // HEADS) for y in tokens]

  def __call__(self, x):
    query, key, value = self.heads(x)
    out = self.attend(query, key, value) + self.attend(key, query, value)
    return self.other(x + out.reshape(x.shape))

  def other(self, x):
    return x + self.attend(*self.heads(x)).reshape(x.shape)


class Biased(ByHand):
  def __call__(self, x):
    query, key, value = self.heads(x)
    bias = jnp.eye(TOKENS)
    return self.attend(query, key, value, bias=bias, scale=0.2).reshape(x.shape)


class InSetup(nn.Module):
  attend: object = TEACHER

  def setup(self):
    self.layers = [Block(self.attend), Block(self.attend)]

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return self.layers[0](x)  # once more


class Decorated(Block):
  @nn.remat
  @nn.compact
  def __call__(self, x):
    return x + 0.2 * flax_layer(self.attend)(x)


class Made(nn.Module):
  """Makes its layers while it runs, by a function of the attention function."""

  make: object
  attend: object = TEACHER

  @nn.compact
  def __call__(self, x):
    return self.make(self.attend, x)


def scanned(attend, x, step=Step, length=2, **options):
  return nn.scan(step, length=length, **(SHARED | options))(attend)(x, None)[0]


MODULES = {
  "Flax's own": (flax_layer, ["attention"]),
  "in setup": (InSetup, [f"layers_{i}.{{}}" for i in range(2)]),
  "a field": (
    lambda attend: nn.Sequential([Block(attend), Block(attend)]),
    [f"layers_{i}.{{}}" for i in range(2)],
  ),
  "bias and scale": (Biased, ["attention"]),
  "by hand": (ByHand, ["attention", "1", "other"]),
  "decorated": (Decorated, ["{}"]),
  "scan": (
    lambda attend: Made(scanned, attend),
    [f"ScanStep_0.{{}}[{i}]" for i in range(2)],
  ),
  "scan of remat": (
    lambda attend: Made(
      lambda attend, x: scanned(attend, x, nn.remat(Step, prevent_cse=False)), attend
    ),
    [f"ScanCheckpointStep_0.{{}}[{i}]" for i in range(2)],
  ),
  "remat": (
    lambda attend: Made(lambda attend, x: nn.remat(Block)(attend)(x), attend),
    ["CheckpointBlock_0.{}"],
  ),
  "jit": (
    lambda attend: Made(
      lambda attend, x: nn.jit(Block)(attend)(nn.jit(Block)(attend)(x)), attend
    ),
    [f"JitBlock_{i}.{{}}" for i in range(2)],
  ),
  "vmap": (
    lambda attend: Made(
      lambda attend, x: nn.vmap(Block, in_axes=None, axis_size=2, **SHARED)(attend)(x),
      attend,
    ),
    [f"VmapBlock_0.{{}}[{i}]" for i in range(2)],
  ),
  "a lambda": (
    lambda attend: Block(lambda query, key, value: attend(query, key, value)),
    ["{}"],
  ),
}


def compile(module, variables, batches=BATCHES, operator=PLAIN, **options):
  # Times of whole modules take four programs to compile.
  with mock.patch.object(linen, "_milliseconds", return_value={}):
    return asap_jax.compile_linen(
      module, variables, batches, operator, progress=False, **options
    )


def start(module, *inputs):
  return module.init(jax.random.key(0), *(inputs or BATCHES[:1]))


@functools.cache
def block():
  """A block with mask, its variables, and both compiled."""
  batches = [(x, MASK) for x in BATCHES]
  variables = start(Block())
  call = lambda module, batch: module(*batch)  # noqa: E731
  return Block(), variables, compile(Block(), variables, batches, call=call)


@pytest.mark.parametrize("kind", MODULES)
def test_each_call_is_found_and_replaced(kind):
  build, names = MODULES[kind]
  variables = start(build(TEACHER))
  found, own, report = compile(build(TEACHER), variables, operator=Sinkhorn(1))
  layers = [name.format("MultiHeadDotProductAttention_0") for name in names]
  assert [layer.name for layer in report.layers] == layers
  wanted = build(CUT).apply(variables, BATCHES[0])
  apply = jax.jit(found.apply)
  np.testing.assert_allclose(apply(own, BATCHES[0]), wanted, atol=2e-5)
  # Those of the teacher are as they were, and so is what it makes of them.
  trained = build(TEACHER).apply(variables, BATCHES[0])
  assert np.abs(trained - wanted).max() > 1e-3
  np.testing.assert_allclose(apply(variables, BATCHES[0]), trained, atol=2e-5)


def test_layers_of_a_scan_get_the_maps_that_they_get_one_by_one():
  stacked = start(Made(scanned))
  (layers,) = stacked["params"].values()
  parts = [jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(2)]
  single = {"params": {f"layers_{i}": part for i, part in enumerate(parts)}}

  class Two(InSetup):
    def __call__(self, x):
      return self.layers[1](self.layers[0](x))

  found, own, report = compile(Made(scanned), core.freeze(stacked))
  other, others, wanted = compile(Two(), single)
  np.testing.assert_allclose(
    jax.jit(found.apply)(own, BATCHES[0]),
    jax.jit(other.apply)(others, BATCHES[0]),
    atol=2e-3,
  )
  for a, b in zip(report.layers, wanted.layers, strict=True):
    np.testing.assert_allclose(a.tv, b.tv, rtol=1e-3)
    assert a.chosen == b.chosen == "asap"
  (maps,) = (
    layer["MultiHeadDotProductAttention_0"] for layer in own["params"].values()
  )
  assert maps["asap"].dual_map.weights.shape[:2] == (2, HEADS)


def test_the_map_is_the_one_of_the_arrays():
  _, variables, (found, own, report) = block()
  layer = variables["params"]["MultiHeadDotProductAttention_0"]

  @functools.partial(jax.jit, static_argnames="name")
  def heads(name, x):
    return jnp.einsum("bnc,chd->bnhd", x, layer[name]["kernel"]) + layer[name]["bias"]

  calls = [
    asap_jax.AttentionCall(heads("query", x), heads("key", x), MASK) for x in BATCHES
  ]
  options = {"iterations": 2, "epsilon": 0.5, "progress": False}
  attend, wanted = asap_jax.fit(calls, PLAIN, **options)
  (layer_report,) = report.layers
  np.testing.assert_allclose(layer_report.tv, wanted.tv, rtol=1e-3)
  np.testing.assert_allclose(
    jax.jit(found.apply)(own, BATCHES[0], MASK),
    jax.jit(Block(attend).apply)(variables, BATCHES[0], MASK),
    atol=2e-3,
  )


def test_masks_arrive_in_the_compiled_module():
  _, _, (found, own, _) = block()
  out = found.apply(own, BATCHES[0], MASK)
  moved = jnp.where(VALID[..., None], BATCHES[0], 7.0)
  np.testing.assert_allclose(
    found.apply(own, moved, MASK)[VALID], out[VALID], atol=1e-5
  )
  assert np.abs(found.apply(own, BATCHES[0]) - out)[VALID].max() > 1e-2


def test_it_trains_on_with_its_maps_and_inside_another_module():
  _, _, (found, own, _) = block()

  class Whole(nn.Module):
    body: nn.Module

    @nn.compact
    def __call__(self, x):
      return nn.Dense(1)(nn.remat(lambda body, x: body(x, MASK))(self.body, x))

  whole = Whole(found)
  parameters = start(whole)["params"]
  assert "asap" not in str(jax.tree.structure(parameters))  # as a teacher begins
  parameters["body"] = own["params"]
  optimizer = optax.sgd(1e-2)

  @jax.jit
  def step(parameters, state):
    loss, gradient = jax.value_and_grad(
      lambda each: ((whole.apply({"params": each}, BATCHES[0]) - 1.0) ** 2).mean()
    )(parameters)
    updates, state = optimizer.update(gradient, state)
    return loss, optax.apply_updates(parameters, updates), state

  first, after, state = step(parameters, optimizer.init(parameters))
  second, _, _ = step(after, state)
  assert second < first
  before, now = (
    each["body"]["MultiHeadDotProductAttention_0"]["asap"]
    for each in (parameters, after)
  )
  assert isinstance(now, Asap)
  assert np.abs(now.dual_map.weights - before.dual_map.weights).max() > 0


def test_its_variables_are_saved_as_any_others_are(tmp_path):
  _, _, (found, own, _) = block()
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "own", own)
    saver.wait_until_finished()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, own)
    again = saver.restore(tmp_path / "own", shapes)
  np.testing.assert_array_equal(
    found.apply(again, BATCHES[0], MASK), found.apply(own, BATCHES[0], MASK)
  )


def test_other_methods_and_functions_of_the_module_run():
  variables = start(ByHand())
  call = lambda module, batch: module.other(batch)  # noqa: E731
  found, own, report = compile(ByHand(), variables, operator=Sinkhorn(1), call=call)
  assert [layer.name for layer in report.layers] == ["other"]
  wanted = ByHand(CUT).apply(variables, BATCHES[0], method="other")
  for method in ("other", call):
    out = found.apply(own, method, BATCHES[0], method="run")
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_layers_that_are_left_stay_as_they_are():
  module = MODULES["in setup"][0](TEACHER)
  variables = start(module)
  leave = ["layers_0.MultiHeadDotProductAttention_0"]
  _, own, report = compile(module, variables, operator=Sinkhorn(1), leave=leave)
  assert [layer.name[:8] for layer in report.layers] == ["layers_1"]
  assert "asap" not in own["params"]["layers_0"]["MultiHeadDotProductAttention_0"]
  with pytest.raises(ValueError, match=r"leave=\['no'\]: .*layers_0"):
    compile(module, variables, leave=["no"])


def test_a_layer_that_runs_twice_is_fitted_to_both_calls():
  variables = start(InSetup())
  call = lambda module, batch: module(batch)  # noqa: E731
  seen = linen._Observer(InSetup(), variables, BATCHES, call, False, ())
  for calls in (*seen.activations("Reading"), seen.sample(100)[0][0]):
    first, second = calls
    assert (len(first), len(second)) == (2, 1)
    assert np.abs(first[0].query - first[1].query).max() > 1e-2


JitBlock = nn.jit(Block)


def test_what_the_teacher_has_traced_in_a_jit_is_not_taken_for_the_compiled():
  module = Made(lambda attend, x: JitBlock(attend)(x))
  variables = start(module)
  found, own, _ = compile(module, variables, operator=Sinkhorn(1))
  trained = module.apply(own, BATCHES[0])  # ignores the operators
  assert np.abs(found.apply(own, BATCHES[0]) - trained).max() > 1e-3


def test_dropout_is_off_where_the_call_says_so_and_times_are_measured():
  module = flax_layer(TEACHER, dropout_rate=0.5)
  variables = start(flax_layer(TEACHER))
  found, own, report = asap_jax.compile_linen(
    module,
    variables,
    [{"x": x} for x in BATCHES],
    Sinkhorn(1),
    call=lambda module, batch: module(batch["x"], deterministic=True),
    progress=False,
  )
  assert list(report.model_milliseconds) == [
    "as trained",
    "exact, fastest",
    "compiled",
    "softmax",
  ]
  assert min(report.model_milliseconds.values()) > 0
  wanted = flax_layer(CUT).apply(variables, BATCHES[0])
  out = found.apply(own, BATCHES[0], deterministic=True)
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  dropped = found.apply(
    own, BATCHES[0], deterministic=False, rngs={"dropout": jax.random.key(0)}
  )
  assert np.abs(dropped - wanted).max() > 1e-2


@pytest.mark.slow
def test_the_best_by_measurement_is_exact_where_nothing_else_is_close_enough():
  module = Made(scanned)
  variables = start(module)
  found, own, report = compile(module, variables, operator=None, target_tv=0.0)
  assert {layer.chosen for layer in report.layers} <= {"sinkhorn@2", "teacher"}
  np.testing.assert_allclose(
    found.apply(own, BATCHES[0]), module.apply(variables, BATCHES[0]), atol=1e-5
  )


def made(make):
  return lambda: Made(make)


def inside(transform):
  attend = transform(lambda query, key, value: TEACHER(query, key, value))
  return lambda: Block(lambda query, key, value: attend(query, key, value))


class Uneven(ByHand):
  def __call__(self, x):
    return self.other(x) + self.other(x, iterations=3)

  def other(self, x, **options):
    return self.attend(*self.heads(x), **options).reshape(x.shape)


NO_PARTS = {"params": False}
REFUSED = {
  "NNX": (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), r"expected a Flax Linen module"),
  "compiled": (lambda: CompiledModule(Block()), "compiled already"),
  "no Sinkhorn": (lambda: nn.Dense(3), "calls no Sinkhorn attention"),
  "jit": (inside(jax.jit), r"^MultiHead\S*: .*JAX's own, such as jax.jit"),
  "vmap": (inside(jax.vmap), r"^MultiHead\S*: .*JAX's own, such as jax.jit"),
  "checkpoint": (inside(jax.checkpoint), r"^MultiHead\S*: .*JAX's own"),
  "shared scan": (
    made(
      lambda attend, x: scanned(
        attend, x, variable_axes={}, variable_broadcast="params", split_rngs=NO_PARTS
      )
    ),
    r"under observation: .*variable_axes",
  ),
  "shared vmap": (
    made(
      lambda attend, x: nn.vmap(
        Block, variable_axes={"params": None}, split_rngs=NO_PARTS
      )(attend)(x)
    ),
    r"under observation: .*variable_axes",
  ),
  "second axis": (
    made(lambda attend, x: scanned(attend, x, variable_axes={"params": 1})),
    r"not stacked on their first axis",
  ),
  "nested scans": (
    made(lambda attend, x: scanned(attend, x, nn.scan(Step, length=2, **SHARED))),
    r"stacked in 2 nested scans",
  ),
  "uneven": (Uneven, r"^other: called as .*expected the same"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_compiled_is_refused(kind):
  build, said = REFUSED[kind]
  module = build()
  variables = start(module) if isinstance(module, nn.Module) else {}
  with pytest.raises(ValueError, match=said):
    compile(module, variables)


def test_a_call_outside_of_modules_is_refused():
  variables = start(ByHand())
  call = lambda module, batch: TEACHER(*module.heads(batch))  # noqa: E731
  with pytest.raises(ValueError, match="outside of every Linen module"):
    compile(ByHand(), variables, call=call)


def test_what_the_module_itself_raises_is_the_reason():
  variables = start(Block())
  with pytest.raises(ValueError, match=r"does not run on the first batch.*call="):
    compile(Block(), variables, [(x, MASK) for x in BATCHES])
