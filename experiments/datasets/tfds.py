"""Where a data set of TensorFlow Datasets (TFDS) is: on disk, or on the network."""

import difflib
import importlib.util
import itertools
import pathlib
import re
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.core.read_only_builder import builder_from_files


class Parts(NamedTuple):
  """`namespace:base/config:version`, as far as they are given."""

  namespace: str
  base: str
  rest: str


class Source(Protocol):
  """Knowledge of a data set before it is found."""

  @property
  def config(self) -> str | None:
    """Its configuration, of several."""

  @property
  def repository(self) -> str | None:
    """Its repository at Hugging Face, if TFDS has it from there."""


def parts_of(name: str) -> Parts:
  """A name of TFDS taken apart.

  Raises:
    ValueError: if it is none.
  """
  match = re.fullmatch(r"(\w+:(?!\d))?(\w+)((?:/[^/:]+)?(?::[\d.*]+)?)", name)
  if match is None:
    raise ValueError(
      f"{name!r}: expected the name of a data set of TFDS, like 'mnist' or "
      "'imdb_reviews/plain_text:1.0.0'"
    )
  return Parts(match[1] or "", match[2], match[3])


def find_builder(
  parts: Parts,
  data_dir: str | pathlib.Path | None,
  source: Source | None,
  presets: tuple[str, ...],
) -> Any:
  """A builder of TFDS whose data are prepared, downloaded if need be.

  Raises:
    ValueError: if there is no data set of this name.
    RuntimeError: if it is not prepared in `data_dir` and cannot be downloaded.
  """
  named = parts.base + parts.rest
  names = [named]
  if source and source.config and not parts.rest.startswith("/"):
    names.insert(0, f"{parts.base}/{source.config}{parts.rest}")
  hosted = None  # TFDS's name of what Hugging Face has
  if source and source.repository:
    hosted = f"{source.repository.replace('/', '__').lower()}/{source.config}"
    names.append(hosted)
  if not parts.rest:  # as Hugging Face calls the only configuration of most
    names += [f"{name.split('/')[0]}/default" for name in names]
  for candidate in names:
    try:
      return builder_from_files(candidate, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
      continue
  catalogue = tfds.list_builders(with_community_datasets=False)
  if not (parts.namespace or source or parts.base in catalogue):
    raise ValueError(_unknown(named, parts.base, data_dir, presets, catalogue))
  asked = f"huggingface:{hosted}" if hosted else parts.namespace + names[0]
  try:
    return _download(asked, source if hosted else None, data_dir)
  except Exception as error:
    cause: BaseException = error
    while cause.__cause__ is not None:
      cause = cause.__cause__
    reason = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0]
    # Which module it misses first says little to whoever has no TensorFlow at all.
    if isinstance(cause, ImportError) and not _has_tensorflow():
      reason = "TensorFlow is not installed"
    hub = hosted or parts.namespace
    needed = "TensorFlow and `datasets`" if hub else "TensorFlow"
    folder = hosted.split("/")[0] if hosted else parts.base
    raise RuntimeError(
      f"{named} is not prepared in {_place(data_dir)}, and TFDS could not download and "
      f"prepare it ({reason}). Where there are a network and {needed}, run `tfds build "
      f"{asked} --file_format=array_record`, and pass as data_dir the directory that "
      f"holds {folder}/"
    ) from error


def _download(
  name: str, hosted: Source | None, data_dir: str | pathlib.Path | None
) -> Any:
  if hosted:  # by its name in TFDS, all of the hub would be listed to find it
    builder = tfds.dataset_builders.HuggingfaceDatasetBuilder(
      hf_repo_id=hosted.repository, hf_config=hosted.config, data_dir=data_dir
    )
  else:
    builder = tfds.builder(name, data_dir=data_dir)
  builder.download_and_prepare(file_format="array_record")
  return builder


def _has_tensorflow() -> bool:
  return importlib.util.find_spec("tensorflow") is not None


def _place(data_dir: str | pathlib.Path | None) -> str:
  return f"data_dir={str(data_dir)!r}" if data_dir else "the data directory of TFDS"


def _unknown(
  named: str,
  base: str,
  data_dir: str | pathlib.Path | None,
  presets: tuple[str, ...],
  catalogue: list[str],
) -> str:
  folder = pathlib.Path(data_dir) if data_dir else None
  here = []
  if folder and folder.is_dir():
    here = [path.name for path in folder.iterdir() if path.is_dir()]
  known = sorted({*presets, *catalogue, *here})
  close = difflib.get_close_matches(base, known, n=5)
  hint = f"Did you mean {' or '.join(close)}?" if close else ""
  prepared = f"There are: {', '.join(sorted(here))}. " if here else ""
  hint = hint or f"Presets are {', '.join(presets)}"
  catalogued = "" if _has_tensorflow() else ", which is not whole without TensorFlow"
  return (
    f"{named!r}: neither prepared in {_place(data_dir)} nor in the catalogue of TFDS"
    f"{catalogued}. {prepared}{hint}"
  )


def check_splits(name: str, info: Any, splits: dict[str, str]) -> None:
  """Checks the `train` split of a data set, and `test` if there is one.

  Raises:
    ValueError: if one does not exist or is empty, or if they share examples.
  """
  there = ", ".join(f"{key} ({s.num_examples:,})" for key, s in info.splits.items())
  taken = []
  for role, split in splits.items():
    try:
      found = info.splits[split]
    except (KeyError, ValueError, AssertionError) as error:
      raise ValueError(
        f"{role}_split={split!r}: no such split of {name}. There are: {there}. A part "
        "of one is written like 'train[80%:]'"
      ) from error
    if found.num_examples < 1:  # a part that ends before it starts has less than none
      raise ValueError(
        f"{role}_split={split!r}: holds no example of {name}. There are: {there}"
      )
    taken.append(found.file_instructions)
  for pair in itertools.combinations(taken, 2):
    for first, second in itertools.product(*pair):
      stops = first.skip + first.take, second.skip + second.take
      if first.filename == second.filename and (
        max(first.skip, second.skip) < min(stops)
      ):
        raise ValueError(
          f"train_split={splits['train']!r} and test_split={splits['test']!r} of {name}"
          " share examples: pass splits, or parts of them, that do not overlap. "
          f"There are: {there}"
        )


def open_split(name: str, builder: Any, split: str) -> Any:
  """A data source of a split, with images left encoded.

  Raises:
    ValueError: if the data set is prepared in a format without random access.
  """
  features = builder.info.features
  images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
  decoders = {key: tfds.decode.SkipDecoding() for key in images}
  try:
    return builder.as_data_source(split, decoders=decoders or None)
  except NotImplementedError as error:
    raise ValueError(
      f"{name} is prepared as {builder.info.file_format.value} in {builder.data_path}, "
      "which has no random access: prepare it with `tfds build "
      f"{name} --file_format=array_record` in another data_dir, or convert it with "
      "`tfds convert_format --out_file_format=array_record`"
    ) from error
