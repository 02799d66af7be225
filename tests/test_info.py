"""What a report of a fault needs: true, whole, and there when JAX is not."""

import functools
import importlib.metadata
import json
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.pages import ROOT

import asap_jax
from asap_jax import info
from asap_jax.attention.functions import sinkhorn_attention


def test_versions_are_those_of_the_modules():
  packages = info.info()["packages"]
  for name in ("jax", "jaxlib", "flax", "optax", "numpy"):
    assert packages[name] == __import__(name).__version__
  assert info.info()["python"] == platform.python_version()


def test_an_implementation_is_available_where_attention_runs_with_it():
  found = info.info()["implementations"]
  assert list(found) == [str(device) for device in jax.local_devices()]
  named = found[str(jax.local_devices()[0])]
  for dtype, reasons in named.items():
    tokens = jnp.ones((1, 128, 1, 64), dtype)
    for name, reason in reasons.items():
      call = functools.partial(
        sinkhorn_attention, tokens, tokens, tokens, iterations=1, implementation=name
      )
      if reason is None:
        assert jax.eval_shape(call).dtype == dtype
      else:
        with pytest.raises(ValueError, match="cannot serve") as raised:
          jax.eval_shape(call)
        assert str(raised.value) == reason


def test_a_package_that_is_missing_is_said_to_be(monkeypatch, capsys):
  version = importlib.metadata.version

  def without_ott(name):
    if name == "ott-jax":
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, "version", without_ott)
  assert info.info()["packages"]["ott-jax"] is None
  info.main()
  assert "ott-jax: not installed" in capsys.readouterr().out


def test_devices_that_do_not_start_are_said_not_to(monkeypatch):
  def no_devices():
    raise RuntimeError("Unable to initialize backend 'cuda'")

  monkeypatch.setattr(jax, "local_devices", no_devices)
  found = info.info()
  assert found["devices"] == {}
  assert "'cuda'" in found["error"]
  assert found["packages"]["jax"] == jax.__version__


def test_a_failure_of_jax_without_words_names_the_platforms(monkeypatch):
  def no_devices():
    raise AssertionError  # as JAX does where none of JAX_PLATFORMS starts

  monkeypatch.setattr(jax, "local_devices", no_devices)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  found = info.info()
  assert found["devices"] == {}
  assert "'cuda'" in found["error"]


def test_it_is_data_and_prints_as_a_command(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  found = info.info()
  assert json.loads(json.dumps(found)) == found
  command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "asap_jax.info"]
  run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  lines = [line.strip() for line in run.stdout.splitlines()]
  assert f"asap_jax: {asap_jax.__version__}" in lines
  assert f"jax: {jax.__version__}" in lines
  assert "JAX_PLATFORMS: cpu" in lines
  assert "xla: available" in lines
  assert any(line.startswith("cudnn: ") and "CPU" in line.upper() for line in lines)
