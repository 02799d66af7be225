"""Texts as the token ids that a pretrained encoder was trained on."""

import pathlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

_CHUNK = 4096  # texts encoded in one call
Keep = Literal["start", "end", "both"]


class TextCoder:
  """The tokenizer of a directory, at one length.

  Special tokens at both ends stay, however long a text is.

  Args:
    path: of a `tokenizer.json`; what it says of padding and cutting is not used.
    length: tokens of a text, special ones included; shorter texts are padded.
    keep: which end stays of texts that are too long; "both" is half from each.

  Raises:
    ValueError: if the file is missing or damaged, the length leaves no token, or `keep`
      is none of these.
  """

  def __init__(self, path: pathlib.Path, length: int, keep: Keep = "start"):
    if keep not in ("start", "end", "both"):
      raise ValueError(f"keep={keep!r}: expected 'start', 'end' or 'both'")
    try:
      self._tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from error
    self.length, self.keep = length, keep
    special = self._tokenizer.num_special_tokens_to_add(False)
    if length <= special:
      raise ValueError(
        f"length={length}: expected more than the {special} special tokens"
      )
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    if keep != "both":
      side = {"start": "right", "end": "left"}[keep]
      self._tokenizer.enable_truncation(length, direction=side)

  @property
  def vocabulary_size(self) -> int:
    """Number of tokens."""
    return self._tokenizer.get_vocab_size()

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 `[texts, length]`, and which of them are not padding, bool."""
    # What stands at padding has no influence.
    ids = np.zeros((len(texts), self.length), np.int32)
    counts = np.empty(len(texts), np.int32)
    head = self.length - self.length // 2
    for start in range(0, len(texts), _CHUNK):
      chunk = list(texts[start : start + _CHUNK])
      for row, encoding in enumerate(self._tokenizer.encode_batch_fast(chunk), start):
        tokens = encoding.ids or [0]  # a text without any has one all the same
        if len(tokens) > self.length:
          tokens = tokens[:head] + tokens[len(tokens) - self.length // 2 :]
        ids[row, : len(tokens)] = tokens
        counts[row] = len(tokens)
    return ids, np.arange(self.length) < counts[:, None]
