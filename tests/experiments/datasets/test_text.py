"""Token ids of texts."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from experiments.datasets.text import clean, encode, tokenizer_for

TEXTS = [
  f"{subject} {verb} the {adjective} film, which {verb} it!"
  for subject in ("She", "He", "The critic", "Nobody")
  for verb in ("loved", "hated", "praised", "forgot")
  for adjective in ("long", "short", "overlong", "unforgettable")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_for(TEXTS, 128, tmp_path_factory.mktemp("cache"))


def test_cleaning():
  assert clean(" A<br />B<br/><BR>\n\tﬁne  ２ ") == "a b <br> fine 2"


def test_special_tokens_come_first(tokenizer):
  assert [tokenizer.id_to_token(i) for i in range(2)] == ["[PAD]", "[UNK]"]
  assert 64 < tokenizer.get_vocab_size() <= 128


@pytest.mark.parametrize("size", [64, 100, 1000])
def test_vocabulary_is_no_larger_than_asked(tmp_path, size):
  letters = "".join(chr(i) for i in range(0x3B1, 0x3B1 + 24))  # more than fit in 64
  texts = [
    *TEXTS,
    letters,
    letters[::-1],
    "0123456789 ()[]{}?:;abcdefghijklmnopqrstuvwxyz",
  ]
  found = tokenizer_for(texts, size, tmp_path)
  assert found.get_vocab_size() <= size


def test_known_words_are_one_token_and_others_are_not_lost(tokenizer):
  ids, valid = encode(tokenizer, ["The FILM loved it", "unloved"], 12)
  assert valid.sum(1)[0] == 4
  assert 1 < valid.sum(1)[1] < 8
  assert (ids[valid] > 1).all()


def test_rows_are_padded_and_cut(tokenizer):
  ids, valid = encode(tokenizer, ["the film", TEXTS[0]], 5)
  assert (ids.dtype, ids.shape, valid.dtype) == (np.int32, (2, 5), np.bool_)
  np.testing.assert_array_equal(valid, [[1, 1, 0, 0, 0], [1] * 5])
  assert (ids[~valid] == 0).all()
  (whole,), (every,) = encode(tokenizer, [TEXTS[0]], 64)
  whole = whole[every]
  np.testing.assert_array_equal(ids[1], whole[:5])
  end, _ = encode(tokenizer, [TEXTS[0]], 5, keep="end")
  np.testing.assert_array_equal(end[0], whole[-5:])
  both, _ = encode(tokenizer, [TEXTS[0]], 5, keep="both")
  np.testing.assert_array_equal(both[0], [*whole[:3], *whole[-2:]])
  one, _ = encode(tokenizer, [TEXTS[0]], 1, keep="both")
  np.testing.assert_array_equal(one[0], whole[:1])


@given(
  st.lists(st.text(max_size=40), min_size=1, max_size=4),
  st.sampled_from(["start", "end", "both"]),
  st.integers(1, 9),
)
def test_cut_rows_are_parts_of_whole_ones(tokenizer, texts, keep, length):
  ids, valid = encode(tokenizer, texts, length, keep=keep)
  assert valid[:, 0].all()
  assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # padding comes last
  head = {"start": length, "end": 0, "both": length - length // 2}[keep]
  for row, mask, text in zip(ids, valid, texts, strict=True):
    tokens = tokenizer.encode(clean(text)).ids or [1]
    if len(tokens) > length:
      tokens = tokens[:head] + tokens[len(tokens) - (length - head) :]
    assert row[mask].tolist() == tokens


def test_nothing_becomes_an_unknown_token(tokenizer):
  ids, valid = encode(tokenizer, ["", " <br /> ", "日本"], 3)
  np.testing.assert_array_equal(ids, [[1, 0, 0]] * 3)
  np.testing.assert_array_equal(valid, ids == 1)


def test_marks_in_a_text_are_text(tmp_path, tokenizer):
  again = tokenizer_for(TEXTS, 128, tmp_path)
  for found in (tokenizer, again, tokenizer_for(TEXTS, 128, tmp_path)):
    ids, valid = encode(found, ["[PAD] film [PAD]"], 12)
    assert (ids[valid] > 0).all()
    assert valid.sum() > 3


def test_cache_is_read_and_holds_all_that_matters(tmp_path):
  cache = tmp_path / "new" / "cache"
  first = tokenizer_for(TEXTS, 128, cache, name="films/plain:1.0.0")
  (file,) = cache.iterdir()
  assert file.name.startswith("films-plain-1-0-0-128-")
  # What is read is the file: a change of it shows.
  file.write_text(file.read_text().replace('"[UNK]"', '"[???]"'))
  second = tokenizer_for(iter(TEXTS), 128, cache, name="films/plain:1.0.0")
  assert first.token_to_id("[UNK]") == second.token_to_id("[???]") == 1
  for texts, size in ((TEXTS[:-1], 128), (TEXTS, 127), ([*TEXTS[:-2], "", ""], 128)):
    tokenizer_for(texts, size, cache, name="films/plain:1.0.0")
  assert len(list(cache.iterdir())) == 4
  assert not list(cache.glob("*.tmp"))


def test_training_is_reproducible(tmp_path):
  for i in range(3):
    tokenizer_for(TEXTS, 128, tmp_path / str(i))
  files = [next((tmp_path / str(i)).iterdir()) for i in range(3)]
  assert len({(file.name, file.read_text()) for file in files}) == 1


def test_errors(tmp_path, tokenizer):
  with pytest.raises(ValueError, match="size=63: expected a vocabulary of at least 64"):
    tokenizer_for(TEXTS, 63, tmp_path)
  with pytest.raises(ValueError, match="texts: got none"):
    tokenizer_for([], 100, tmp_path)
  tokenizer_for(TEXTS, 100, tmp_path)
  (file,) = tmp_path.iterdir()
  file.write_text(file.read_text()[:100])
  with pytest.raises(ValueError, match=r"100-.*json: not a tokenizer .*; delete it"):
    tokenizer_for(TEXTS, 100, tmp_path)
  with pytest.raises(ValueError, match="length=0: expected at least one token"):
    encode(tokenizer, ["a"], 0)
  with pytest.raises(ValueError, match="keep='middle': expected 'start', 'end' or"):
    encode(tokenizer, ["a"], 3, keep="middle")
