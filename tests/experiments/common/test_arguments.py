"""Arguments that make no sense end in one line, before any work."""

import argparse
import pathlib
import re

import pytest

from experiments.common import arguments


@pytest.mark.parametrize(
  ("parse", "text", "expected"),
  [
    (arguments.whole(1), "0", "'0': expected an integer from 1 up"),
    (arguments.whole(1), "1.5", "'1.5': expected an integer from 1 up"),
    (arguments.whole(2, 9), "10", "'10': expected an integer from 2 to 9"),
    (arguments.seed_list, "1,a", "seeds as 0,1,2: 'a': expected an integer from 0"),
    (arguments.seed_list, "-1", "'-1': expected an integer from 0 to 4294967295"),
    (arguments.seed_list, "", "'': expected an integer"),
    (arguments.file, "no/file", "no/file is not a file"),
  ],
)
def test_error_says_what_is_expected(parse, text, expected):
  with pytest.raises(argparse.ArgumentTypeError, match=re.escape(expected)):
    parse(text)


def test_numbers_and_files_are_read(tmp_path):
  assert [arguments.whole(2, 9)(text) for text in ("2", "9")] == [2, 9]
  assert arguments.seed_list("0,4294967295,7") == [0, 2**32 - 1, 7]
  path = tmp_path / "file"
  path.touch()
  assert arguments.file(str(path)) == path


def test_results_go_to_new_directories_alone(tmp_path):
  assert arguments.new_directory(str(tmp_path)) == tmp_path
  deep = tmp_path / "new" / "deep"
  assert arguments.new_directory(str(deep)) == deep
  assert not list(tmp_path.iterdir())
  (tmp_path / "results.json").write_text("{}")
  with pytest.raises(argparse.ArgumentTypeError, match="is not empty: name a new"):
    arguments.new_directory(str(tmp_path))
  assert arguments.writable(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("below", ["", "new", "new/deep"])
def test_files_are_no_directories(tmp_path, below):
  (tmp_path / "file").touch()
  with pytest.raises(argparse.ArgumentTypeError, match=r"cannot be written to \(Not a"):
    arguments.writable(str(tmp_path / "file" / below))


def test_file_systems_for_reading_only():
  place = pathlib.Path("/proc")
  if not place.is_dir():
    pytest.skip("there is none here")
  with pytest.raises(argparse.ArgumentTypeError, match="/proc/new cannot be written"):
    arguments.writable("/proc/new")


def test_directories_of_others(tmp_path, monkeypatch):
  def fails(dir):
    assert dir == tmp_path
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(arguments.tempfile, "TemporaryFile", fails)
  with pytest.raises(argparse.ArgumentTypeError, match="Permission denied"):
    arguments.writable(str(tmp_path / "new"))


def test_parsers_have_an_output_and_a_seed(tmp_path, capsys):
  parser = arguments.parser_for("Does something.\n\nIn detail.")
  arguments.add_seed(parser)
  args = parser.parse_args(["--out", str(tmp_path)])
  assert vars(args) == {"out": tmp_path, "seed": 0}
  with pytest.raises(SystemExit):
    parser.parse_args(["--out", str(tmp_path), "--seed", "-1"])
  assert "argument --seed: '-1': expected" in capsys.readouterr().err
  assert parser.description == "Does something."
