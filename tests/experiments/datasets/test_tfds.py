"""Data sets that are not there, or not in a form that can be read."""

import pytest
from helpers import tfds_sets
from helpers.tfds_sets import text_features, texts

from experiments.datasets import tfds as own_tfds
from experiments.datasets.tasks import load_task

PAIRS = [("good film", 1), ("bad film", 0), ("a good one", 1), ("bad", 0)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """Texts under a name that TFDS does not know."""
  folder, splits = tmp_path_factory.mktemp("tfds"), {"train": PAIRS, "test": PAIRS[:3]}
  rows = {name: texts(pairs) for name, pairs in splits.items()}
  return tfds_sets.write(folder, "films", text_features(), rows)


def load_films(folder, **options):
  keys = {"input_key": "text", "label_key": "label"}
  return load_task("films", data_dir=folder, **(keys | options))


def test_unknown_data_set(films):
  message = "'flims': neither prepared in.*There are: films.*Did you mean films"
  with pytest.raises(ValueError, match=message):
    load_task("flims", data_dir=films)
  with pytest.raises(ValueError, match=r"Did you mean .*ag_news_subset"):
    load_task("ag_news", data_dir=films)
  with pytest.raises(ValueError, match=r"qqqq.*Presets are ag_news_subset, imdb"):
    load_task("qqqq", data_dir=films / "nowhere")
  with pytest.raises(ValueError, match="expected the name of a data set of TFDS"):
    load_task("../films", data_dir=films)


def test_other_formats_are_refused(tmp_path):
  rows = texts(PAIRS)
  tfds_sets.write(tmp_path, "films", text_features(), {"train": rows, "test": rows})
  info = tmp_path / "films" / "1.0.0" / "dataset_info.json"
  tfds_sets.edit_json(info, '"fileFormat": "array_record"', '"fileFormat": "tfrecord"')
  with pytest.raises(ValueError, match=r"prepared as tfrecord.*format=array_record"):
    load_films(tmp_path)


class Absent:
  """A builder of a data set that cannot be had."""

  def download_and_prepare(self, **options):
    assert options == {"file_format": "array_record"}
    try:
      raise ConnectionError("no network\nand more")
    except ConnectionError as error:
      raise RuntimeError("not prepared") from error


@pytest.mark.parametrize(
  ("name", "asked", "folder"),
  [
    ("imdb_reviews", "imdb_reviews/plain_text", "imdb_reviews"),
    ("mnist:3.0.1", "mnist:3.0.1", "mnist"),
    ("yelp_polarity_reviews", "yelp_polarity_reviews", "yelp_polarity_reviews"),
    ("huggingface:glue/sst2", "huggingface:glue/sst2", "glue"),
    (
      "dbpedia_14",
      "huggingface:fancyzhx__dbpedia_14/dbpedia_14",
      "fancyzhx__dbpedia_14",
    ),
  ],
)
def test_download_that_fails(tmp_path, monkeypatch, name, asked, folder):
  opened = []

  def builder(name=None, *, data_dir, **repository):
    opened.append(name or repository)
    assert data_dir == tmp_path
    return Absent()

  builders = own_tfds.tfds.dataset_builders
  monkeypatch.setattr(own_tfds.tfds, "builder", builder)
  monkeypatch.setattr(builders, "HuggingfaceDatasetBuilder", builder)
  with pytest.raises(RuntimeError, match=r"ConnectionError: no network\)") as caught:
    load_task(name, data_dir=tmp_path)
  assert f"run `tfds build {asked} --file_format=array_record`" in str(caught.value)
  assert f"the directory that holds {folder}/" in str(caught.value)
  assert ("`datasets`" in str(caught.value)) == asked.startswith("huggingface:")
  hosted = {"hf_repo_id": "fancyzhx/dbpedia_14", "hf_config": "dbpedia_14"}
  assert opened == [hosted if name == "dbpedia_14" else asked]


def test_data_sets_cannot_be_prepared_without_tensorflow(tmp_path, monkeypatch):
  def builder(name, *, data_dir):
    raise ModuleNotFoundError("No module named 'importlib_resources'")

  monkeypatch.setattr(own_tfds.tfds, "builder", builder)
  monkeypatch.setattr(own_tfds.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match=r"prepare it \(TensorFlow is not installed\)"):
    load_task("mnist", data_dir=tmp_path)
  monkeypatch.setattr(own_tfds.importlib.util, "find_spec", lambda name: name)
  with pytest.raises(RuntimeError, match="No module named 'importlib_resources'"):
    load_task("mnist", data_dir=tmp_path)


def test_download_is_read(films, monkeypatch):
  """What is prepared elsewhere by then is read as usual."""
  found = own_tfds.builder_from_files("films", data_dir=films)
  prepared = []
  monkeypatch.setattr(
    found, "download_and_prepare", lambda **_: prepared.append(1), raising=False
  )
  monkeypatch.setattr(own_tfds.tfds, "builder", lambda *_, **__: found)
  task = load_task("yelp_polarity_reviews", data_dir=films / "empty")
  assert prepared == [1]
  assert [row["input"] for row in task.train] == [text for text, _ in PAIRS]
