"""A teacher in files."""

import numpy as np
import pytest


@pytest.fixture
def files(tmp_path):
  """A random teacher of one layer for token ids, and inputs with padding."""
  random = np.random.default_rng(0)
  width, length, words = 16, 12, 30

  def matrix(*shape):
    return random.normal(size=shape).astype(np.float16) / shape[0] ** 0.5

  weights = {
    "emb": matrix(words, width),
    "pos": matrix(length, width),
    "qkv0": 1.5 * matrix(width, 3 * width),
    "o0": matrix(width, width),
    "m10": matrix(width, 4 * width),
    "m20": matrix(4 * width, width),
    "out": matrix(width, 3),
  }
  ids = random.integers(1, words, size=(136, length))
  ids[np.arange(length) >= random.integers(6, length + 1, size=(136, 1))] = 0
  np.savez(tmp_path / "teacher.npz", **weights)
  inputs = dict(
    xtrain=ids[:128].astype(np.int32),
    xtest=ids[128:].astype(np.int32),
    ytest=random.integers(3, size=8),
  )
  np.savez(tmp_path / "inputs.npz", **inputs)
  return tmp_path
