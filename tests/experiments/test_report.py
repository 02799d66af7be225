"""Results of several runs in one table and in figures."""

import json

import pytest

from experiments import report


def results(**changes):
  return {
    "experiment": "downstream",
    "config": {"dataset": "news", "seeds": [0, 1]},
    "environment": {"jax": "0.10.2", "device_kind": "cpu", "commit": "abc1234"},
    "rows": [
      {
        "method": "sinkhorn",
        "accuracy": 0.9,
        "accuracy_std": 0.01,
        "accuracies": [0.89, 0.91],
        "tv": 0.0,
        "milliseconds": 9.0,
        "layers": [{"tv": 0.0}],
      },
      {"method": "sinkhorn@1", "accuracy": 0.8, "tv": 0.2, "milliseconds": 2.0},
      {"method": "asap", "accuracy": 0.89, "tv": 0.01, "milliseconds": 4.0},
      {"method": "asap", "shift": "half length", "accuracy": 0.7, "tv": 0.123456},
    ],
    "seconds": {"total": 61.7},
  } | changes


OTHER = results(
  experiment="speed",
  config={"seed": 3},
  environment={"jax": "0.10.2", "device_kind": "cpu", "commit": None},
  rows=[{"method": "softmax", "length": 128, "milliseconds": 1.5}],
)


def test_runs_share_a_table():
  lines = report.markdown([results(), OTHER]).split("\n")
  assert lines == [
    "| run | method | shift | accuracy | tv | milliseconds | length |",
    "| --- | --- | --- | --- | --- | --- | --- |",
    "| downstream, news | sinkhorn |  | 0.9000 ± 0.0100 | 0 | 9 |  |",
    "| downstream, news | sinkhorn@1 |  | 0.8000 | 0.2 | 2 |  |",
    "| downstream, news | asap |  | 0.8900 | 0.01 | 4 |  |",
    "| downstream, news | asap | half length | 0.7000 | 0.1235 |  |  |",
    "| speed | softmax |  |  |  | 1.5 | 128 |",
    "",
    "- downstream, news: cpu, JAX 0.10.2, commit abc1234, seeds 0, 1, 62 s",
    "- speed: cpu, JAX 0.10.2, seed 3, 62 s",
  ]


def test_words_do_not_break_the_table():
  found = report.markdown([results(rows=[{"method": "a|b", "accuracy": None}])])
  assert "| downstream, news | a\\|b |" in found
  assert "accuracy" not in found


def test_the_command_writes_table_and_figures(tmp_path, capsys):
  for name, content in (("one", results()), ("two", OTHER)):
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(content))
  given = [str(tmp_path / name) for name in ("one", "two")]
  report.main(given)
  table = capsys.readouterr().out
  assert table.strip() == report.markdown([results(), OTHER])
  out = tmp_path / "out"
  report.main([*given, "--out", str(out)])
  assert (out / "report.md").read_text() == table
  files = sorted(path.name for path in out.iterdir())
  assert files == ["accuracy.png", "frontier-0-one.png", "report.md"]
  assert all((out / name).stat().st_size > 5_000 for name in files[:2])
  with pytest.raises(SystemExit):
    report.main([*given, "--out", str(out)])
  assert "name a new directory" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (None, "does not exist: expected a directory of an experiment"),
    ("{", "is no JSON"),
    ("[]", "lacks ['config', 'environment', 'experiment', 'rows']"),
    ('{"rows": [], "config": {}, "environment": {}}', "lacks ['experiment']"),
  ],
)
def test_what_is_no_result(tmp_path, capsys, content, expected):
  if content is not None:
    (tmp_path / "results.json").write_text(content)
  with pytest.raises(SystemExit):
    report.main([str(tmp_path)])
  assert expected in " ".join(capsys.readouterr().err.split())
