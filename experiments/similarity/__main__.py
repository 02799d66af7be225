"""Convert a pretrained encoder, compile it, and compare embeddings of sentences.

python -m experiments.similarity --dataset NAME --out DIR [--data-dir D] [--init DIR]
"""

import argparse
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import asap_jax
from experiments.common import replacements
from experiments.common.arguments import parser_for, whole
from experiments.common.onnx_runtime import onnx_function
from experiments.common.results import options_of, print_end, print_rows, write_results
from experiments.common.timing import Laps, time_interleaved
from experiments.datasets.examples import evenly
from experiments.datasets.tasks import load_task
from experiments.encoders import TextCoder, directory_of, load_encoder

BATCH = 64
# Tokens that forward passes are timed at, and sequences in one of them.
LENGTHS, TIMED = (128, 256, 512), 8
# Of ONNX Runtime, and of its calls.
THREADS, REPEATS = 2, 9
Batch = tuple[np.ndarray, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
  parser = parser_for(__doc__)
  add = parser.add_argument
  add("--dataset", required=True, help="its name in TFDS, of texts")
  add("--data-dir", type=pathlib.Path, help="with prepared data sets")
  add("--init", default="minilm", help="encoder: minilm, or a directory")
  add("--length", type=whole(3), default=128, help="tokens of a text")
  add("--texts", type=whole(256), default=2048, help="training texts to refit on")
  add("--pairs", type=whole(2), default=512, help="of neighbouring test texts")
  add("--iterations", type=whole(1), default=5, help="of Sinkhorn, from zero")
  add("--onnx", action="store_true", help="export as well, and time ONNX Runtime")
  args = parser.parse_args(arguments)
  option = "init"
  try:
    directory = directory_of(args.init)
    load_encoder(directory)
    option = "length"
    coder = TextCoder(directory / "tokenizer.json", args.length)
    option = "dataset"
    task = load_task(args.dataset, data_dir=args.data_dir)
    if task.kind != "text":
      raise ValueError(f"{task.name} holds {task.kind}s: expected texts")
  except (ValueError, RuntimeError) as error:
    parser.error(f"argument --{option}: {error}")
  train, test = (
    [examples[int(i)]["input"] for i in evenly(examples, limit)]
    for examples, limit in ((task.train, args.texts), (task.test, 2 * args.pairs))
  )
  run(directory, coder, train, test[: len(test) // 2 * 2], args)


def run(
  directory: pathlib.Path,
  coder: TextCoder,
  train: Sequence[str],
  test: Sequence[str],
  args: argparse.Namespace,
) -> list[dict[str, Any]]:
  """The whole experiment; returns the rows that it writes to `out/results.json`."""
  laps = Laps()
  batches = batches_of(coder, train)
  softmax = load_encoder(directory)
  converted = {
    name: asap_jax.to_sinkhorn(
      softmax, args.iterations, "zero", refit=refit, batches=batches[:n], call=embed
    )
    for name, refit, n in (("sinkhorn", True, None), ("plain switch", False, 1))
  }
  teacher, moved = converted["sinkhorn"]
  print(moved)
  laps.end("convert")
  compiled, report = asap_jax.compile(teacher, batches, call=embed)
  print(report)
  laps.end("compile")
  models = {
    "softmax": softmax,
    "plain switch": converted["plain switch"].model,
    "sinkhorn": teacher,
    "best": compiled,
  }
  runs = {name: nnx.jit(embed) for name in models}
  embedded = {
    name: np.concatenate(
      [np.asarray(runs[name](model, batch)) for batch in batches_of(coder, test)]
    )
    for name, model in models.items()
  }
  rows = rows_of(embedded)
  most = softmax.config.max_position_embeddings
  for length in (each for each in LENGTHS if each <= most):
    batch = filled(coder, train, length)
    forward = {name: replacements.forward(Embedding(m)) for name, m in models.items()}
    times = replacements.milliseconds_of(forward, batch)
    for row in rows:
      row[f"milliseconds_{length}"] = times[row["method"]]
  laps.end("evaluate")
  if args.onnx:
    served = in_onnx(models, batches_of(coder, test)[0], args.out)
    rows = [{**row, **served[row["method"]]} for row in rows]
    laps.end("serve")
  config = options_of(args)
  path = write_results(args.out, "similarity", config, rows, laps.seconds)
  print_rows(rows, f"{args.dataset}, {len(test) // 2} pairs of test texts")
  print_end(laps.seconds, path)
  return rows


class Embedding(nnx.Module):
  """An encoder as a function of one batch."""

  def __init__(self, encoder: nnx.Module):
    self.encoder = encoder

  def __call__(self, batch: Batch) -> jax.Array:
    """Embeddings."""
    return embed(self.encoder, batch)


def embed(model: Any, batch: Batch) -> jax.Array:
  """Embeddings of a batch of token ids, and which are no padding."""
  return model(*batch)


def in_onnx(
  models: Mapping[str, nnx.Module], batch: Batch, out: pathlib.Path
) -> dict[str, dict[str, float]]:
  """Entries of each model's row by ONNX Runtime, on a batch of texts with padding.

  `onnx_difference` is the largest of an embedding from JAX's.
  """
  runs, rows = {}, {}
  for name, model in models.items():
    path = out / f"{name.replace(' ', '_')}.onnx"
    asap_jax.export_onnx(model, batch, path)
    runs[name] = functools.partial(onnx_function(path, THREADS), *batch)
    apart = np.abs(runs[name]() - np.asarray(nnx.jit(embed)(model, batch))).max()
    rows[name] = {"onnx_difference": float(apart)}
  times = time_interleaved(runs, REPEATS)
  return {
    name: {**row, "onnx_milliseconds": times[name].median} for name, row in rows.items()
  }


def batches_of(coder: TextCoder, texts: Sequence[str]) -> list[Batch]:
  """Token ids in batches of one size, the last one shorter."""
  ids, valid = coder(texts)
  starts = range(0, len(ids), BATCH)
  return [(ids[i : i + BATCH], valid[i : i + BATCH]) for i in starts]


def filled(coder: TextCoder, texts: Sequence[str], length: int) -> Batch:
  """Sequences without padding, of the tokens of texts one after the other."""
  ids, valid = coder(texts)
  tokens = np.resize(ids[valid], (TIMED, length))
  return tokens, np.ones(tokens.shape, bool)


def rows_of(embedded: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
  """How the embeddings of each model agree with those of softmax.

  `cosine` is the mean over texts of that between a text's two embeddings; `correlation`
  that of the similarities of pairs of neighbouring texts.
  """
  unit = {
    name: each / np.linalg.norm(each, axis=-1, keepdims=True)
    for name, each in embedded.items()
  }
  pairs = {name: (each[::2] * each[1::2]).sum(-1) for name, each in unit.items()}
  return [
    {
      "method": name,
      "cosine": float((unit["softmax"] * unit[name]).sum(-1).mean()),
      "correlation": float(np.corrcoef(pairs["softmax"], pairs[name])[0, 1]),
    }
    for name in embedded
  ]


if __name__ == "__main__":
  main()
