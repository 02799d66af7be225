"""Texts as token ids."""

import hashlib
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from experiments.common.results import write_whole

PAD, UNKNOWN = "[PAD]", "[UNK]"
_RECIPE = "1"  # to be changed with what `_train` does, so that caches are not reused
_CHUNK = 4096  # texts encoded in one call


def clean(text: str) -> str:
  """Lower case, one form of each character, single blanks, and no line-end marks."""
  text = re.sub(r"<br\s*/?>", " ", text)  # as in IMDb's reviews
  return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def tokenizer_for(
  texts: Iterable[str], size: int, cache: pathlib.Path, *, name: str = "texts"
) -> Tokenizer:
  """A byte-pair encoding of cleaned text, trained on `texts`.

  It is kept in the directory `cache` under `name` and a digest of all that it depends
  on, the texts among them, and read from there the next time. Token 0 is padding and
  token 1 stands for characters that `texts` do not have.

  Args:
    texts: of the training split alone.
    size: of the vocabulary at most, with both special tokens.
    cache: directory, made if need be.
    name: of the data, for people who look into `cache`.

  Raises:
    ValueError: if `size` is less than 64, there are no texts, or a file of the cache
      is damaged.
  """
  texts = [clean(text) for text in texts]
  if size < 64:
    raise ValueError(f"size={size}: expected a vocabulary of at least 64 tokens")
  if not texts:
    raise ValueError("texts: got none, expected those of a training split")
  digest = hashlib.sha256(f"{_RECIPE} {tokenizers.__version__} {size}".encode())
  for text in texts:
    encoded = text.encode()
    digest.update(f" {len(encoded)} ".encode() + encoded)
  stem = re.sub(r"\W+", "-", name)
  path = cache / f"{stem}-{size}-{digest.hexdigest()[:16]}.json"
  if path.exists():
    try:
      tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(f"{path}: not a tokenizer ({error}); delete it") from error
  else:
    tokenizer = _train(texts, size)
    write_whole(path, tokenizer.to_str())
  tokenizer.encode_special_tokens = True  # "[PAD]" in a text is text
  return tokenizer


def _train(texts: Sequence[str], size: int) -> Tokenizer:
  # No mark tells the start of a word from its inside: with one, the library numbers
  # the alphabet by chance, and the vocabulary would differ from run to run.
  tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=[PAD, UNKNOWN],
    limit_alphabet=min(size // 2, 256),
    min_frequency=2,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def encode(
  tokenizer: Tokenizer,
  texts: Sequence[str],
  length: int,
  *,
  keep: Literal["start", "end", "both"] = "start",
) -> tuple[np.ndarray, np.ndarray]:
  """Token ids int32 [texts, length] and which of them are not padding, bool.

  Every row has a token: a text without any becomes one unknown token. Of texts that
  are too long, `keep` says which end stays; "both" is half of the tokens from each.

  Raises:
    ValueError: if `length` is not positive or `keep` none of these.
  """
  if length < 1:
    raise ValueError(f"length={length}: expected at least one token")
  if keep not in ("start", "end", "both"):
    raise ValueError(f"keep={keep!r}: expected 'start', 'end' or 'both'")
  head = {"start": length, "end": 0, "both": length - length // 2}[keep]
  tail = length - head
  unknown = tokenizer.token_to_id(UNKNOWN)
  assert unknown is not None, f"tokenizer was not trained with {UNKNOWN}"
  ids = np.full((len(texts), length), tokenizer.token_to_id(PAD), np.int32)
  counts = np.empty(len(texts), np.int32)
  for start in range(0, len(texts), _CHUNK):
    chunk = [_cut(clean(t), head, tail) for t in texts[start : start + _CHUNK]]
    for row, encoding in enumerate(tokenizer.encode_batch_fast(chunk), start):
      tokens = encoding.ids or [unknown]
      if len(tokens) > length:
        tokens = tokens[:head] + tokens[len(tokens) - tail :]
      ids[row, : len(tokens)] = tokens
      counts[row] = len(tokens)
  return ids, np.arange(length) < counts[:, None]


def _cut(text: str, head: int, tail: int) -> str:
  """Leaves out words that cannot matter, as every word is at least one token."""
  words = text.split()
  if len(words) <= head + tail:
    return text
  return " ".join(words[:head] + words[len(words) - tail :])
