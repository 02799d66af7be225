"""What compiling gives: the model, its dual maps, and the report of its fidelity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import models, oracles, references

import asap_jax
from asap_jax import AsapAttention, DualParam
from asap_jax.compiler.sites import find_sinkhorn

SLICES, DIM = 4, models.WIDTH // models.HEADS
SIZES = range(models.HEADS)
compile = functools.partial(models.compile_recipe, refine_steps=0)


def one_layer():
  return models.toy(depth=1)


def dual_map_of(model, block=0):
  return model.blocks[block].attention.attention_fn.dual_map


def queries_and_keys(x):
  """Of the first layer of the toy teacher, in NumPy; logits are their product."""
  attention = models.teacher().blocks[0].attention
  query, key = (
    np.einsum("bnf,fhd->bhnd", np.float64(x), np.float64(linear.kernel[...]))
    for linear in (attention.query, attention.key)
  )
  return query * DIM**-0.5, key


@functools.cache
def expected_batch(index):
  """Source duals, features and logits of the first layer, `[batch, heads, ...]`."""
  query, key = queries_and_keys(models.batches()[index])
  logits = query @ np.swapaxes(key, -1, -2)
  directions = np.float64(dual_map_of(models.compiled().model).directions)
  duals, columns = np.zeros(logits.shape[:-1]), []
  for b, h in np.ndindex(logits.shape[:2]):
    start = np.zeros(models.TOKENS)
    f, _ = oracles.closures(logits[b, h], start, models.ITERATIONS - 1)
    duals[b, h] = f - f.mean()
    columns.append(references.dual_features(query[b, h], key[b, h], directions[h]))
  return duals, np.reshape(columns, (*duals.shape, -1)), logits


def closed_plans(logits, duals, count=1):
  plans = np.zeros_like(logits)
  for b, h in np.ndindex(logits.shape[:2]):
    closed = oracles.closures(logits[b, h], duals[b, h], count)
    plans[b, h] = oracles.plan(logits[b, h], *closed)
  return plans


@pytest.mark.slow
def test_teacher_stays_as_it_was():
  models.compiled()
  models.assert_same_state(models.teacher(), models.toy())
  sites = find_sinkhorn(models.teacher())
  assert [site.iterations for site in sites] == [models.ITERATIONS] * 2


def test_every_site_of_the_copy_is_replaced():
  model = models.compiled().model
  assert find_sinkhorn(model) == []
  for block, original in zip(model.blocks, models.teacher().blocks, strict=True):
    assert isinstance(block.attention.attention_fn, AsapAttention)
    assert dict(block.attention.attention_fn.options) == {"epsilon": 1.0}
    np.testing.assert_array_equal(
      block.attention.out.kernel[...], original.attention.out.kernel[...]
    )


def test_principal_directions_against_numpy():
  total = np.zeros((models.HEADS, DIM, DIM))
  for index, x in enumerate(models.batches()):
    if index != 1:
      for points in queries_and_keys(x):
        centred = points - points.mean(2, keepdims=True)
        moment = np.einsum("bhnd,bhne->hde", centred, centred)
        total += moment / np.trace(moment, axis1=1, axis2=2)[:, None, None]
  expected = np.linalg.eigh(total)[1][..., ::-1][..., :SLICES]
  actual = np.float64(dual_map_of(models.compiled().model).directions)
  cosines = np.einsum("hld,hdl->hl", actual, expected)
  np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-3)


def test_dual_map_is_the_ridge_regression_of_the_source_dual():
  duals, columns, _ = (
    np.concatenate(parts)
    for parts in zip(*(expected_batch(i) for i in (0, 2, 3, 4, 5)), strict=True)
  )
  weights = np.float64(dual_map_of(models.compiled().model).weights)
  for head in SIZES:
    F = columns[:, head].reshape(-1, columns.shape[-1])
    gram, deviation = F.T @ F / len(F), (F**2).mean(0)
    moment = F.T @ duals[:, head].ravel() / len(F)
    expected = np.linalg.solve(gram + 1e-6 * np.diag(deviation), moment)
    np.testing.assert_allclose(F @ weights[head], F @ expected, atol=2e-3)


def test_report_of_a_layer_against_numpy():
  report = models.compiled().report
  layer = report.layers[0]
  assert (layer.name, layer.iterations) == ("blocks.0.attention", models.ITERATIONS)
  duals, columns, logits = expected_batch(1)
  weights = np.float64(dual_map_of(models.compiled().model).weights)
  predicted = np.einsum("bhnp,hp->bhn", columns, weights)
  teacher, plan = closed_plans(logits, duals), closed_plans(logits, predicted)
  ratio = 1 - ((duals - predicted) ** 2).sum((0, 2)) / (duals**2).sum((0, 2))
  figures = {
    "r2": ratio,
    "tv": np.abs(teacher - plan).sum(-1).mean((0, 2)) / 2,
    "kl": (teacher * np.log(teacher / plan)).sum(-1).mean((0, 2)),
    "column_error": np.abs(plan.sum(-2) - 1).mean((0, 2)),
    "teacher_column_error": np.abs(teacher.sum(-2) - 1).mean((0, 2)),
  }
  for name, expected in figures.items():
    actual = getattr(layer, name)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-5, err_msg=name)
  assert min(layer.milliseconds, layer.teacher_milliseconds, layer.seconds) > 0
  # The fit must be worth more than the one iteration that the operator costs.
  cut = closed_plans(logits, np.zeros_like(duals))
  assert np.all(layer.tv < 0.7 * np.abs(teacher - cut).sum(-1).mean((0, 2)) / 2)


def test_report_prints_every_layer_and_head():
  report = models.compiled().report
  lines = str(report).splitlines()
  for layer in report.layers:
    first = next(i for i, line in enumerate(lines) if layer.name in line)
    for head in SIZES:
      for value in (layer.r2[head], layer.tv[head], layer.kl[head]):
        assert f" {value:.4f} " in lines[first + head]
  assert lines[0] == report.headline
  assert max(map(len, lines)) <= 100


def test_compiled_model_has_gradients_under_jit():
  model, x = models.compiled().model, models.batches()[1]

  @nnx.jit
  def slopes(model, x):
    return nnx.grad(lambda model: (model(x) ** 2).sum())(model)

  for path, slope in nnx.to_flat_state(slopes(model, x)):
    assert jnp.isfinite(slope[...]).all(), path
    if path[-1] in ("directions", "weights"):
      assert jnp.abs(slope[...]).max() > 1e-3, path
  assert len(jax.tree.leaves(nnx.state(model, DualParam))) == 4


def test_compiled_output_is_near_that_of_the_teacher():
  x = models.batches()[1]
  teacher, cut = models.teacher(), models.toy()
  for block in cut.blocks:
    block.attention.attention_fn = functools.partial(
      asap_jax.sinkhorn_attention, iterations=1
    )
  expected = models.forward(teacher, x)
  error, of_cut = (
    jnp.linalg.norm(models.forward(model, x) - expected)
    for model in (models.compiled().model, cut)
  )
  assert error < 0.7 * of_cut


@pytest.mark.slow
def test_batches_that_can_be_read_only_once_give_the_same():
  expected = compile(one_layer(), models.batches()[:3], 2).model
  actual = compile(one_layer(), iter(models.batches()[:3]), 2).model
  models.assert_same_state(actual, expected)


@pytest.mark.slow
def test_random_directions_depend_on_the_seed_alone():
  run = functools.partial(compile, batches=models.batches()[:2], slices=12)
  first, again, other = (
    run(one_layer(), directions="orthogonal", seed=seed).model for seed in (3, 3, 4)
  )
  models.assert_same_state(first, again)
  directions, others = (dual_map_of(model).directions for model in (first, other))
  assert np.abs(directions - others).max() > 0.1
  assert directions.shape == (models.HEADS, 12, DIM)


@pytest.mark.slow
def test_padded_dictionaries_of_inputs_give_the_same_as_bare_tokens():
  plain = models.batches()[:3]
  bare = compile(one_layer(), plain, 3)
  garbage = [jnp.pad(x, ((0, 0), (2, 1), (0, 0)), constant_values=50.0) for x in plain]
  valid = (jnp.arange(models.TOKENS + 3) >= 2) & (
    jnp.arange(models.TOKENS + 3) < models.TOKENS + 2
  )
  valid = jnp.broadcast_to(valid, (16, models.TOKENS + 3))
  padded = compile(
    one_layer(),
    [{"tokens": x, "valid": valid} for x in garbage],
    3,
    call=lambda model, batch: model(
      batch["tokens"], nnx.make_attention_mask(batch["valid"], batch["valid"])
    ),
  )
  for name in ("r2", "tv", "kl", "column_error", "teacher_column_error"):
    expected, actual = (
      getattr(result.report.layers[0], name) for result in (bare, padded)
    )
    np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_layer_called_twice_is_calibrated_on_both_calls():
  model = models.toy()
  model.blocks[1] = model.blocks[0]
  result = compile(model, models.batches()[:3], 2)
  assert len(result.report.layers) == 1
  assert result.model.blocks[0] is result.model.blocks[1]
  assert find_sinkhorn(result.model) == []


def test_kinds_of_features_are_kept():
  kinds = ("query", "cumulants")
  result = compile(one_layer(), models.batches()[:2], 1, features=kinds)
  dual_map = dual_map_of(result.model)
  assert dual_map.features == kinds
  assert dual_map.weights.shape == (models.HEADS, DIM + 2)
