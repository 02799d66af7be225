"""A GPU that is not there."""

import pytest

from asap_jax.attention.implementations import choice


@pytest.fixture
def on_gpu(monkeypatch):
  monkeypatch.setattr(choice, "_platform", lambda array: "gpu")
  monkeypatch.setattr(choice, "_no_cudnn", lambda *arguments: None)
