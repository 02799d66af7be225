"""Sizes and budgets of the downstream experiment, and the models that they make."""

import dataclasses
from typing import Any, Literal

from flax import nnx

from experiments.common.attentions import build_functions
from experiments.common.models import Classifier, EncoderConfig
from experiments.common.train import TrainConfig
from experiments.datasets.prepare import Prepared
from experiments.datasets.tfds import parts_of
from experiments.downstream.models import TextEncoder, VisionTransformer

# Images up to this side keep their size if the patches fit.
SMALL_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Preset:
  """A model, its training, and its compilation.

  Attributes:
    width: features inside.
    heads: of attention.
    layers: attention and MLP blocks.
    length: tokens of a text.
    vocabulary: of a tokenizer for texts.
    keep: which end stays of texts that are too long.
    image_size: side that images of more than `SMALL_SIDE` are scaled to.
    patch: side of those of large images; of small ones it is 4.
    convolutions: whether convolutions embed the patches.
    positions: see `EncoderConfig`.
    dropout: see `EncoderConfig`.
    token_dropout: see `EncoderConfig`.
    dtype: see `EncoderConfig`.
    steps: of training.
    batch_size: of training.
    learning_rate: the highest.
    weight_decay: of AdamW.
    label_smoothing: of the training loss.
    checks: looks at the held-out examples, and checkpoints.
    refine_steps: of compiling, per layer.
    calibration: training inputs to compile with.
    teacher: attention of the model that is called `sinkhorn`, by a name of
      `experiments.common.attentions`.
    distil_steps: before fine-tuning a pretrained encoder that was converted, without
      labels.
  """

  width: int
  heads: int
  layers: int
  length: int = 64
  vocabulary: int = 8000
  keep: Literal["start", "end", "both"] = "start"
  image_size: int = 32
  patch: int = 4
  convolutions: bool = False
  positions: float = 0.1
  dropout: float = 0.1
  token_dropout: float = 0.0
  dtype: str = "float32"
  steps: int = 600
  batch_size: int = 64
  learning_rate: float = 3e-3
  weight_decay: float = 0.05
  label_smoothing: float = 0.0
  checks: int = 8
  refine_steps: int = 300
  calibration: int = 1280
  teacher: str = "sinkhorn"
  distil_steps: int = 0

  def training(self) -> TrainConfig:
    """Options of the optimizer."""
    fields = (field.name for field in dataclasses.fields(TrainConfig))
    return TrainConfig(**{name: getattr(self, name) for name in fields})


_TINY_TEXT = Preset(width=64, heads=2, layers=2, token_dropout=0.2)
_TINY_IMAGE = Preset(
  width=64,
  heads=2,
  layers=3,
  convolutions=True,
  dropout=0.0,
  steps=1500,
  learning_rate=2e-3,
)
# Sizes are those of the encoder.
_PRETRAINED = Preset(
  width=0,
  heads=0,
  layers=0,
  length=128,
  vocabulary=0,
  steps=600,
  batch_size=32,
  learning_rate=2e-4,
  weight_decay=0.01,
  calibration=640,
  refine_steps=100,
  teacher="sinkhorn@5",
  distil_steps=300,
)
_PAPER_TEXT = Preset(
  width=256,
  heads=8,
  layers=6,
  length=512,
  vocabulary=16_000,
  token_dropout=0.1,
  dtype="bfloat16",
  steps=20_000,
  learning_rate=5e-4,
  checks=40,
  refine_steps=2000,
  calibration=4096,
)
_PAPER_IMAGE = dataclasses.replace(
  _PAPER_TEXT,
  image_size=224,
  patch=16,
  token_dropout=0.0,
  steps=40_000,
  batch_size=256,
  learning_rate=1e-3,
)
PRESETS = {
  "tiny": {"text": _TINY_TEXT, "image": _TINY_IMAGE},
  # As docs/gaussian_start.md recommends to train.
  "few": {
    kind: dataclasses.replace(preset, teacher="gaussian@2")
    for kind, preset in (("text", _TINY_TEXT), ("image", _TINY_IMAGE))
  },
  "paper": {"text": _PAPER_TEXT, "image": _PAPER_IMAGE},
  # Begins at a pretrained encoder: `--init`.
  "pretrained": {"text": _PRETRAINED},
}
SIZES = tuple(name for name in PRESETS if name != "pretrained")
# Other values for one data set: long reviews, of which both ends say most.
_LONG_REVIEWS: dict[str, Any] = {
  "length": 128,
  "keep": "both",
  "batch_size": 32,
  "steps": 900,
  "dropout": 0.2,
  "token_dropout": 0.3,
}
# So that training both models on two cores takes less than half an hour. Of a few
# thousand texts small batches learn more: distillation is at 0.164 after 120 steps of
# 16, at 0.182 after 60 of 32.
_LONG_PRETRAINED = {
  "keep": "both",
  "batch_size": 16,
  "steps": 480,
  "distil_steps": 320,
  "checks": 4,
}
_BOTH_ENDS = {"length": 128, "keep": "both"}
_YELP = ("yelp_review_full", "yelp_polarity_reviews")
_OWN: dict[tuple[str, str], dict[str, Any]] = {
  **{(size, "imdb_reviews"): _LONG_REVIEWS for size in ("tiny", "few")},
  **{(size, name): _BOTH_ENDS for size in ("tiny", "few") for name in _YELP},
  # Their texts have fifty tokens.
  ("pretrained", "ag_news_subset"): {"length": 64},
  **{("pretrained", name): _LONG_PRETRAINED for name in ("imdb_reviews", *_YELP)},
}


def preset_of(size: str, kind: str, name: str) -> Preset:
  """The preset of a data set.

  Args:
    size: "tiny", "few", "paper" or "pretrained".
    kind: "text" or "image".
    name: of the data set, with or without a configuration.
  """
  base = parts_of(name).base.rpartition("__")[2]
  own = _OWN.get((size, base), {})
  return dataclasses.replace(PRESETS[size][kind], **own)


def encoder_config(preset: Preset, prepared: Prepared) -> EncoderConfig:
  """Sizes of the encoder for a data set.

  Raises:
    ValueError: if the patches do not divide the images.
  """
  if prepared.kind == "text":
    assert prepared.vocabulary_size is not None
    length, token_size = preset.length, prepared.vocabulary_size
  else:
    assert prepared.image_shape is not None
    height, width, channels = prepared.image_shape
    patch = patch_of(preset, height)
    if height % patch or width % patch:
      raise ValueError(
        f"images are {height} x {width}: expected multiples of the patch, {patch}"
      )
    length, token_size = height * width // patch**2, patch**2 * channels
  return EncoderConfig(
    length,
    token_size,
    prepared.classes,
    preset.width,
    preset.heads,
    preset.layers,
    preset.positions,
    preset.dropout,
    preset.token_dropout,
    preset.dtype,
  )


def patch_of(preset: Preset, side: int) -> int:
  """Side of the patches of images."""
  return min(4, preset.patch) if side <= SMALL_SIDE else preset.patch


def build(name: str, preset: Preset, prepared: Prepared, seed: int) -> Classifier:
  """A model with a named attention; all else starts alike under one seed.

  `sinkhorn` is the preset's teacher.

  Raises:
    ValueError: if the attention is unknown, or the sizes do not fit.
  """
  config = encoder_config(preset, prepared)
  name = preset.teacher if name == "sinkhorn" else name
  functions = build_functions(name, config, seed)
  if prepared.kind == "text":
    return TextEncoder(config, functions, nnx.Rngs(seed))
  assert prepared.image_shape is not None
  height, _, channels = prepared.image_shape
  return VisionTransformer(
    config,
    functions,
    nnx.Rngs(seed),
    patch=patch_of(preset, height),
    channels=channels,
    convolutions=preset.convolutions,
  )
