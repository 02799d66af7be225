"""Plans are measured as they are."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.common import measuring
from experiments.common.digits import Split
from experiments.common.models import Encoder, EncoderConfig

TINY = EncoderConfig(length=6, token_size=1, classes=3, width=8, heads=2, layers=2)


RANDOM = np.random.default_rng(0)


TOKENS = RANDOM.normal(size=(7, TINY.length, 1)).astype(np.float32)


LABELS = RANDOM.integers(3, size=7)


def to_first_key(query, key, value, *, module=None, **given):
  """All queries attend to the first key, the first one twice."""
  weights = jnp.zeros((len(query), TINY.heads, TINY.length, TINY.length))
  weights = weights.at[..., 0].set(1.0).at[..., 0, 0].set(2.0)
  if module is not None:
    module.sow(nnx.Intermediate, "attention_weights", weights)
  return jnp.broadcast_to(value[:, :1], value.shape)


@pytest.mark.slow
def test_plans_are_measured_as_they_are(monkeypatch):
  model = Encoder(TINY, to_first_key, nnx.Rngs(0))
  found = measuring.measure(model, Split(TOKENS, LABELS))
  n = TINY.length
  assert found["row_error"] == pytest.approx(1 / n)
  assert found["column_error"] == pytest.approx((n + n - 1) / n)
  assert found["attention_sink_share"] == pytest.approx(1.0)
  right = np.asarray(model(TOKENS)).argmax(-1) == LABELS
  assert found["accuracy"] == pytest.approx(right.mean())
  residuals = [np.mean([_residual(x) for x in s]) for s in model.states(TOKENS)]
  np.testing.assert_allclose(found["rank_residual"], residuals, rtol=1e-5)
  assert found["n_test"] == 7

  # Batches of unequal size count by their sizes.
  monkeypatch.setattr(measuring, "BATCH", 3)
  in_parts = measuring.measure(model, Split(TOKENS, LABELS))
  assert in_parts == {name: pytest.approx(value) for name, value in found.items()}


def _residual(tokens):
  """Of Dong et al., 2021, in float64."""
  tokens = np.asarray(tokens, np.float64)
  norms = [
    np.sqrt(np.linalg.norm(x, 1) * np.linalg.norm(x, np.inf))
    for x in (tokens - tokens.mean(0), tokens)
  ]
  return norms[0] / norms[1]
