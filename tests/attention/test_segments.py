"""Packed sequences: every attention of each segment by itself, in one row of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracles

import asap_jax
from asap_jax.attention.amortized import AmortizedAttention
from asap_jax.c_transform.segments import Segments, segments_of
from asap_jax.peers import ATTENTIONS, attention_named

BATCH, N, M, HEADS, DIM = 2, 14, 12, 2, 4
QUERIES = np.array([[1] * 4 + [2] * 6 + [0] + [3] * 3, [2] * 9 + [1] * 4 + [0]])
KEYS = np.array([[1] * 5 + [2] * 3 + [0] * 2 + [3] * 2, [1] * 5 + [2] * 5 + [0] * 2])
IDS = tuple(map(jnp.asarray, (QUERIES, KEYS)))

DUAL_MAPS = {
  "slices": asap_jax.DualMap(
    jax.random.normal(jax.random.key(5), (HEADS, 2, DIM)),
    0.3 * jax.random.normal(jax.random.key(6), (HEADS, 2 + DIM)),
    ("potentials", "query"),
  ),
  "cumulants": asap_jax.DualMap(
    jnp.ones((HEADS, 0, DIM)),
    0.3 * jax.random.normal(jax.random.key(7), (HEADS, 2)),
    ("cumulants",),
  ),
}
SINKHORN = asap_jax.sinkhorn_attention
FUNCTIONS = {
  "one iteration": functools.partial(SINKHORN, iterations=1),
  "OTT-JAX": functools.partial(SINKHORN, iterations=3, implementation="ott"),
  "xla": functools.partial(SINKHORN, iterations=3, implementation="xla"),
  "chunked": functools.partial(SINKHORN, iterations=3, implementation="chunked"),
  "relaxed": functools.partial(SINKHORN, iterations=3, relaxation=1.4),
  "relaxed, chunked": functools.partial(
    SINKHORN, iterations=3, relaxation=1.4, implementation="chunked"
  ),
  "Gaussian": functools.partial(SINKHORN, iterations=2, start="gaussian"),
  "Gaussian, chunked": functools.partial(
    SINKHORN, iterations=2, start="gaussian", implementation="chunked"
  ),
  "half": functools.partial(SINKHORN, iterations=0, start="gaussian_diagonal"),
  **{
    name: functools.partial(asap_jax.asap_attention, dual_map=dual_map)
    for name, dual_map in DUAL_MAPS.items()
  },
  "slices, chunked": functools.partial(
    asap_jax.asap_attention, dual_map=DUAL_MAPS["slices"], implementation="chunked"
  ),
  "softmax": asap_jax.softmax_attention,
  "sinkformer": attention_named("sinkformer"),
}


def tokens(dtype=jnp.float32, n=N, m=M):
  rngs = jax.random.split(jax.random.key(0), 3)
  shapes = (BATCH, n, HEADS, DIM), *((BATCH, m, HEADS, DIM),) * 2
  return tuple(
    1.5 * jax.random.normal(rng, shape, dtype)
    for rng, shape in zip(rngs, shapes, strict=True)
  )


def one_by_one(function, query, key, value, ids=IDS, loop=jax.lax.map):
  """Each segment as a batch by itself, all else being padding."""

  def alone(segment):
    rows, columns = (each == segment for each in ids)
    mask = nnx.make_attention_mask(rows, columns, dtype=bool)
    return function(query, key, value, mask=mask)

  return loop(alone, jnp.arange(1, 4)).sum(0)


def with_gradients(function):
  """Values, and cotangents of queries, keys and values from drawn ones."""

  @jax.jit
  def run(*arguments):
    out, pull = jax.vjp(function, *arguments)
    bar = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    return out, pull(bar)

  return run


SLOW = (
  "one iteration",
  "Gaussian",
  "relaxed, chunked",
  "Gaussian, chunked",
  "slices, chunked",
)


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FUNCTIONS],
)
def test_a_packed_row_is_its_segments_one_by_one(name):
  function, given = FUNCTIONS[name], tokens()
  packed = functools.partial(function, segment_ids=IDS, max_segments=3)
  (found, bars), (wanted, others) = (
    with_gradients(each)(*given)
    for each in (packed, functools.partial(one_by_one, function))
  )
  np.testing.assert_allclose(found, wanted, atol=2e-5)
  for bar, other in zip(bars, others, strict=True):
    np.testing.assert_allclose(bar, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["ott", "xla", "chunked"])
def test_plans_are_those_of_the_blocks_in_float64(implementation):
  query, key, value = tokens()
  found = SINKHORN(
    query, key, value, iterations=4, implementation=implementation, segment_ids=IDS
  )
  out = np.zeros(found.shape)
  for element, head, segment in np.ndindex(BATCH, HEADS, 3):
    rows, columns = (each[element] == segment + 1 for each in (QUERIES, KEYS))
    if rows.any() and columns.any():
      own, others = (np.asarray(x[element, :, head], np.float64) for x in (query, key))
      logits = own[rows] @ others[columns].T / DIM**0.5
      duals = oracles.closures(logits, np.zeros(rows.sum()), 4)
      values = np.asarray(value[element, columns, head], np.float64)
      out[element, rows, head] = oracles.plan(logits, *duals) @ values
  np.testing.assert_allclose(found, out, atol=1e-5)


def test_every_block_is_doubly_stochastic():
  query, key, _ = tokens()
  each_key = jnp.broadcast_to(jnp.eye(M)[:, None], (BATCH, M, HEADS, M))
  out = SINKHORN(query, key, each_key, iterations=200, segment_ids=IDS)
  plans = jnp.moveaxis(out, 2, 1)
  for element in range(BATCH):
    rows = QUERIES[element] > 0
    np.testing.assert_allclose(plans[element].sum(-1), [1.0 * rows] * HEADS, atol=1e-5)
    same = QUERIES[element][:, None] == KEYS[element]
    assert not np.any(np.asarray(plans[element])[:, ~(same & rows[:, None])])
    for segment in (1, 2):
      columns = KEYS[element] == segment
      share = (QUERIES[element] == segment).sum() / columns.sum()
      sums = plans[element].sum(-2)[:, columns]
      np.testing.assert_allclose(sums, np.full(sums.shape, share), rtol=2e-2)


@pytest.mark.parametrize("name", ["OTT-JAX", "xla", "chunked", "half", "slices"])
def test_segments_of_one_side_are_padding(name):
  queries, keys = (jnp.array([[1, 1, 1, last, last]] * BATCH) for last in (2, 3))
  given = tokens(n=5, m=5)
  attend = functools.partial(FUNCTIONS[name], max_segments=3)
  found, bars = with_gradients(functools.partial(attend, segment_ids=(queries, keys)))(
    *given
  )
  alone = FUNCTIONS[name](*(x[:, :3] for x in given))
  np.testing.assert_allclose(found[:, :3], alone, atol=2e-5)
  for array in (found, *bars):
    assert not np.any(array[:, 3:])


@pytest.mark.parametrize(
  "name", ["xla", "slices", pytest.param("Gaussian", marks=pytest.mark.slow)]
)
def test_a_mask_of_segments_is_understood(name):
  function, given = functools.partial(FUNCTIONS[name], max_segments=3), tokens()
  mask = jnp.asarray((QUERIES[..., None] == KEYS[:, None]) & (QUERIES > 0)[..., None])
  wanted = function(*given, segment_ids=IDS)
  np.testing.assert_allclose(function(*given, mask=mask[:, None]), wanted, atol=1e-6)
  jitted = jax.jit(function)
  np.testing.assert_allclose(jitted(*given, mask=mask[:, None]), wanted, atol=1e-5)
  # Heads may be packed each in its own way.
  of_heads = jnp.stack([mask, jnp.zeros_like(mask).at[..., :3, :2].set(True)], 1)
  found = jitted(*given, mask=of_heads)
  np.testing.assert_allclose(found[:, :, 0], wanted[:, :, 0], atol=1e-5)
  assert not np.any(found[:, 3:, 1])


def test_masks_that_are_none_of_segments():
  given, causal = tokens(n=6, m=6), jnp.tril(jnp.ones((BATCH, 1, 6, 6), bool))
  with pytest.raises(ValueError, match="mask is not that of segments"):
    SINKHORN(*given, mask=causal, max_segments=6)
  ids = jnp.arange(6) // 3
  blocks = (ids[:, None] == ids)[None, None]
  mixed = jnp.concatenate([blocks, causal[:1]])
  out = jax.jit(functools.partial(SINKHORN, max_segments=6))(*given, mask=mixed)
  assert np.isfinite(out[0]).all()
  assert np.isnan(out[1]).all()
  with pytest.raises(ValueError, match="bind max_segments"):
    SINKHORN(*given, mask=blocks)


def test_more_segments_than_there_may_be():
  given = tokens()
  with pytest.raises(ValueError, match="max_segments=2: an element of the batch has 3"):
    SINKHORN(*given, segment_ids=IDS, max_segments=2)
  packed = jax.jit(functools.partial(SINKHORN, max_segments=2, start="gaussian"))
  out = packed(*given, segment_ids=IDS)
  assert np.isnan(out[0]).all()
  assert np.isfinite(out[1]).all()


def test_the_number_of_segments_is_asked_for_where_it_has_to_be_known():
  packed = jax.jit(lambda ids: SINKHORN(*tokens(), segment_ids=ids))
  np.testing.assert_allclose(
    packed(IDS), SINKHORN(*tokens(), segment_ids=IDS), atol=1e-5
  )
  with pytest.raises(ValueError, match="max_segments=None"):
    jax.jit(lambda ids: SINKHORN(*tokens(), segment_ids=ids, start="gaussian"))(IDS)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"segment_ids": IDS[0]}, r"segment_ids has shape \(2, 14\).*\(2, 12\)"),
    ({"segment_ids": IDS[0][0]}, r"expected integers \(2, 14\)"),
    ({"segment_ids": (IDS[0] * 1.0, IDS[1])}, "dtype float32: expected integers"),
    ({"segment_ids": (-IDS[0], IDS[1])}, "segment_ids has -3"),
    ({"segment_ids": (*IDS, IDS[0])}, "a tuple of 3"),
    ({"segment_ids": IDS, "max_segments": 0}, "max_segments=0: expected at least one"),
    ({"segment_ids": IDS, "mask": jnp.ones((1, N, M), bool)}, "mask with segment_ids"),
    ({"segment_ids": IDS, "implementation": "cudnn"}, "packed sequences"),
    ({"mask": jnp.ones((1, 1, M), bool), "max_segments": 2}, "mask has shape"),
  ],
)
def test_segments_that_make_no_sense(options, message):
  with pytest.raises(ValueError, match=message):
    SINKHORN(*tokens(), **options)


@pytest.mark.parametrize("name", ["swgg", "est"])
def test_attentions_without_blocks_say_so(name):
  with pytest.raises(ValueError, match=f"{name}_attention does not serve packed"):
    ATTENTIONS[name](*tokens(n=M), segment_ids=IDS[1])


def test_bias_and_low_precision():
  query, key, value = tokens(jnp.bfloat16)
  bias = jax.random.normal(jax.random.key(3), (BATCH, HEADS, N, M))
  given = functools.partial(SINKHORN, bias=bias, segment_ids=IDS)
  wide = given(*(x.astype(jnp.float32) for x in (query, key, value)))
  for implementation in ("xla", "chunked"):
    found = given(query, key, value, implementation=implementation)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=0.05)


@pytest.mark.slow
def test_vmap_is_a_loop_and_padding_may_hold_anything():
  given = tokens()
  attend = functools.partial(SINKHORN, start="gaussian", iterations=2, max_segments=3)
  wanted = attend(*given, segment_ids=IDS)

  @jax.vmap
  def mapped(query, key, value, *ids):
    return attend(query, key, value, segment_ids=ids)

  np.testing.assert_allclose(mapped(*given, *IDS), wanted, atol=1e-5)
  holed = [
    jnp.where((ids == 0)[..., None, None], jnp.nan, x)
    for ids, x in zip((*IDS, IDS[1]), given, strict=True)
  ]
  np.testing.assert_array_equal(attend(*holed, segment_ids=IDS), wanted)


def test_tolerance_stops_when_all_segments_are_done():
  given = tokens()
  attend = functools.partial(SINKHORN, iterations=100, segment_ids=IDS, tolerance=1e-5)
  wanted = SINKHORN(*given, iterations=300, segment_ids=IDS)
  for implementation in ("xla", "chunked"):
    found = attend(*given, implementation=implementation)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.slow
def test_a_map_learns_on_segments():
  given = tokens(n=M)
  layer = AmortizedAttention(HEADS, DIM)
  packed = functools.partial(layer, segment_ids=IDS[1], max_segments=3)

  def loop(function, segments):  # for it keeps its loss
    return jnp.stack([function(each) for each in segments])

  wanted = one_by_one(layer, *given, ids=(IDS[1], IDS[1]), loop=loop)
  np.testing.assert_allclose(packed(*given), wanted, atol=2e-5)


def test_in_chunks_no_pair_is_looked_at():
  def loss(query, ids):
    attend = functools.partial(SINKHORN, iterations=2, implementation="chunked")
    return attend(query, query, query, segment_ids=ids).sum()

  n = 8192
  shapes = (jax.ShapeDtypeStruct((1, n, 1, 4), jnp.float32),)
  shapes += (jax.ShapeDtypeStruct((1, n), jnp.int32),)
  compiled = jax.jit(jax.grad(loss)).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < n * n


def test_layers_of_flax_pass_the_mask_on():
  attend = functools.partial(SINKHORN, start="gaussian", iterations=2, max_segments=3)
  layer = nnx.MultiHeadAttention(
    HEADS, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=attend
  )
  x = jax.random.normal(jax.random.key(1), (BATCH, M, 8))
  ids = IDS[1]
  mask = nnx.make_attention_mask(ids, ids, jnp.equal, dtype=bool)
  mask &= nnx.make_attention_mask(ids > 0, ids > 0, dtype=bool)
  found = nnx.jit(layer)(x, mask=mask)
  alone = layer(x[:1, 5:8])
  np.testing.assert_allclose(found[:1, 5:8], alone, atol=1e-5)


def test_segments_are_counted_by_their_first_keys():
  mask = np.zeros((5, 6), bool)
  mask[np.ix_([0, 3], [2, 5])] = True
  mask[np.ix_([1], [0, 4])] = True
  segments, is_known = segments_of(jnp.asarray(mask))
  assert is_known.item()
  assert segments.query.tolist() == [2, 1, 0, 2, 0]
  assert segments.key.tolist() == [1, 0, 2, 0, 1, 2]
  queries, keys = Segments(*segments).masses
  assert queries.tolist() == [True, True, False, True, False]
  assert keys.tolist() == [0.5, 0.0, 1.0, 0.0, 0.5, 1.0]
  lonely = Segments(jnp.array([1, 2]), jnp.array([1, 3]))
  assert [x.tolist() for x in lonely.masses] == [[True, False], [1.0, 0.0]]
