"""Runs of `experiments.downstream` that take a moment, and the data for them."""

import dataclasses
import pathlib
import tempfile
import time

import jax
import numpy as np
from flax import nnx

import asap_jax
from experiments.common.models import EncoderConfig
from experiments.common.train import TrainConfig
from experiments.datasets.loaders import loader
from experiments.datasets.tasks import Task
from experiments.downstream.models import TextEncoder
from experiments.downstream.presets import PRESETS
from experiments.downstream.training import train

ATTENTION = asap_jax.sinkhorn_attention
CONFIG = TrainConfig(steps=12, batch_size=8, learning_rate=3e-2)
SIZES = EncoderConfig(
  length=6,
  token_size=12,
  classes=3,
  width=8,
  heads=2,
  layers=1,
  dropout=0.1,
  token_dropout=0.1,
)


class StoppedError(Exception):
  """Instead of a batch."""


class Batches:
  """Those of `batches`, until `stop` of them were given."""

  def __init__(self, batches, stop, pause):
    self._batches, self._stop, self._pause, self._given = batches, stop, pause, 0
    self.get_state, self.set_state = batches.get_state, batches.set_state

  def __next__(self):
    if self._given == self._stop:
      raise StoppedError
    if self._given == self._pause:
      time.sleep(600)
    self._given += 1
    return next(self._batches)


def examples(count, seed):
  """Texts whose label is that of the third that most of their tokens come from."""
  random = np.random.default_rng(seed)
  label = random.integers(3, size=count).astype(np.int32)
  own = random.random((count, 6)) < 0.7
  ids = np.where(own, label[:, None] * 4, 0) + random.integers(4, size=(count, 6))
  valid = np.arange(6) < random.integers(2, 7, size=(count, 1))
  return {"ids": ids.astype(np.int32), "valid": valid, "label": label}


def held_out():
  return loader(examples(64, 1), 32, seed=0, shuffle=False, epochs=1)


def run(directory, *, config=CONFIG, checks=4, stop=None, pause=None):
  batches = loader(examples(40, 0), config.batch_size, seed=3)
  return train(
    TextEncoder(SIZES, ATTENTION, nnx.Rngs(0)),
    Batches(batches, stop, pause),
    held_out,
    config,
    seed=0,
    checks=checks,
    directory=pathlib.Path(directory),
    label="small",
  )


def parameters(result):
  return nnx.state(result.model, nnx.Param)


@nnx.jit
def forward(model, batch):
  return model(batch)


def print_on_two_devices():
  """Prints devices that hold parameters, an odd batch's error, the norm at the end."""
  with tempfile.TemporaryDirectory() as name:
    result = run(name)
  with tempfile.TemporaryDirectory() as name:
    try:
      run(name, config=TrainConfig(steps=1, batch_size=3))
    except ValueError as error:
      told = str(error).split()[0]
  leaves = jax.tree.leaves(parameters(result))
  norm = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in leaves))
  print(len(leaves[0].sharding.device_set), told, norm)


WORDS = (
  ("goal", "match", "team"),
  ("bank", "market", "share"),
  ("cell", "gene", "lab"),
)


PRESET = dataclasses.replace(
  PRESETS["tiny"]["text"],
  width=8,
  heads=2,
  layers=1,
  length=8,
  vocabulary=64,
  steps=6,
  batch_size=8,
  checks=2,
  refine_steps=2,
  calibration=32,
)


def texts(count, seed):
  """Sentences of words of their class, among words that say nothing."""
  random = np.random.default_rng(seed)
  found = []
  for index in range(count):
    words = random.choice((*WORDS[index % 3], "the", "and"), random.integers(2, 9))
    found.append({"input": " ".join(words), "label": index % 3})
  return found


def task(name="news"):
  names = ("sport", "business", "science")
  return Task(name, "text", texts(100, 0), texts(40, 1), 3, names)


def images(count, side=8):
  random = np.random.default_rng(0)
  pixels = random.integers(256, size=(count, side, side, 3), dtype=np.uint8)
  return [{"input": image, "label": i % 2} for i, image in enumerate(pixels)]
