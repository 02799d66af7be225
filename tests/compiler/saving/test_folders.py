"""One model at a path, whoever writes, reads or is stopped there."""

import contextlib
import logging
import os
import pathlib
import shutil
import types

import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers.pages import ROOT
from helpers.saved import blank, compiled, entries, value_of

import asap_jax
from asap_jax import load, save
from asap_jax.compiler.saving import arrays, folders, manifest

WHOLE = ["manifest.json", "v-"]


class Killed(BaseException):
  """The process is gone: nothing after it runs."""


@contextlib.contextmanager
def killed_at(step):
  """Stops at a step that changes what others see, and clears nothing on the way out."""
  steps = iter(range(1000))
  dead = False

  def counted(function):
    def run(*args, **kwargs):
      nonlocal dead
      if dead:
        return None
      if next(steps) == step:
        dead = True
        raise Killed
      return function(*args, **kwargs)

    return run

  # Those of the module alone: Orbax has steps of its own.
  replace, rename, rmtree = map(counted, (os.replace, os.rename, shutil.rmtree))
  of_os = types.SimpleNamespace(**vars(os) | {"replace": replace, "rename": rename})
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(folders, "os", of_os)
    patch.setattr(folders, "shutil", types.SimpleNamespace(rmtree=rmtree))
    for name in ("publish", "clear_litter"):
      patch.setattr(folders, name, counted(getattr(folders, name)))
    patch.setattr(folders.time, "sleep", lambda seconds: None)
    try:
      yield
    except Killed:
      return
  raise IndexError(step)


@pytest.mark.parametrize("before", [None, "today's", "format 2"])
def test_interrupted_at_any_step_a_save_leaves_the_old_model_or_the_new(
  tmp_path, before
):
  path = tmp_path / "there" / "model"
  seen = set()
  step = 0
  while True:
    shutil.rmtree(path.parent, ignore_errors=True)
    if before == "today's":
      save(path, compiled(1.0))
    elif before:
      shutil.copytree(old_model(), path)
    try:
      with killed_at(step):
        save(path, compiled(2.0), overwrite=True)
    except IndexError:
      break
    if path.exists():
      seen.add(whole(path))
    else:
      assert before is None
      seen.add(None)
    save(path, compiled(3.0), overwrite=True)
    assert whole(path) == 3.0
    assert (entries(path), entries(path.parent)) == (WHOLE, ["model"]), step
    step += 1
  assert step > 2
  assert seen == {1.0 if before else None, 2.0}


def old_model():
  return ROOT / "tests" / "fixtures" / "compiled_before_rooms" / "compiled"


def whole(path):
  """Which model is there; the one of format 2 counts as 1."""
  if manifest.read(path)["format"] == 2:
    manifest.check_files(path, manifest.read(path))
    return 1.0
  return value_of(load(path, blank()))


def test_of_two_writers_of_a_new_model_one_is_told(tmp_path, monkeypatch):
  path = tmp_path / "model"
  between(monkeypatch, lambda: save(path, compiled(1.0)))
  with pytest.raises(FileExistsError, match="exists already: pass overwrite=True"):
    save(path, compiled(2.0))
  assert whole(path) == 1.0
  assert (entries(path), entries(tmp_path)) == (WHOLE, ["model"])


def test_of_two_writers_that_replace_the_last_one_counts(tmp_path, monkeypatch):
  path = tmp_path / "model"
  for there in (False, True):  # the second time it replaces a model that is there
    between(monkeypatch, lambda: save(path, compiled(1.0), overwrite=True))
    save(path, compiled(2.0), overwrite=True)
    assert whole(path) == 2.0, there
    assert (entries(path), entries(tmp_path)) == (WHOLE, ["model"])


def between(monkeypatch, other):
  """Runs another while the next save has written its arrays and nothing more."""
  own = arrays.write

  def write(*args):
    own(*args)
    monkeypatch.setattr(arrays, "write", own)
    other()

  monkeypatch.setattr(arrays, "write", write)


@pytest.mark.parametrize("has_locks", [True, False])
def test_who_reads_meanwhile_gets_the_old_model_or_the_new(
  tmp_path, monkeypatch, has_locks
):
  path = tmp_path / "model"
  save(path, compiled(1.0))
  own = manifest.check_files

  def check_files(*args):
    monkeypatch.setattr(manifest, "check_files", own)
    save(path, compiled(2.0), overwrite=True)
    if not has_locks:  # where nothing is held, anything may be gone
      for version in path.glob("v-*"):
        if version.name != manifest.read(path)["folder"]:
          shutil.rmtree(version)
    own(*args)

  monkeypatch.setattr(manifest, "check_files", check_files)
  assert whole(path) == (1.0 if has_locks else 2.0)
  assert whole(path) == 2.0
  # What was held is cleared by who comes next.
  save(path, compiled(3.0), overwrite=True)
  assert entries(path) == WHOLE


def test_only_litter_is_cleared(tmp_path):
  path = tmp_path / "model"
  save(path, compiled(1.0))
  own = [tmp_path / ".model.backup", tmp_path / ".model.0123456789abcdef.saved"]
  own += [path / "v-1", path / "notes"]
  other = tmp_path / ".other.0123456789abcdef.saving"
  held = path / "v-0123456789abcdef"
  litter = [path / "v-fedcba9876543210"]
  litter += [tmp_path / ".model.fedcba9876543210.saving"]
  for folder in (*own, other, held, *litter):
    folder.mkdir()
  with folders.reading(held):  # without a lock to hold: as if of nobody
    pass
  descriptor = folders._hold(held, alone=True)
  save(path, compiled(2.0), overwrite=True)
  assert all(folder.exists() for folder in (*own, other, held))
  assert not any(folder.exists() for folder in litter)
  folders._let_go(descriptor)
  save(path, compiled(2.0), overwrite=True)
  assert not held.exists()


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
  (tmp_path / "manifest.json").write_text('{"name": "an application"}')
  with pytest.raises(FileExistsError, match="is not a saved model"):
    save(tmp_path, compiled(), overwrite=True)
  with pytest.raises(ValueError, match="or none of asap_jax"):
    load(tmp_path, blank())
  assert entries(tmp_path) == ["manifest.json"]


def test_a_damaged_model_can_be_replaced(tmp_path):
  path = tmp_path / "model"
  save(path, compiled(1.0))
  (path / "manifest.json").write_text("{")
  save(path, compiled(2.0), overwrite=True)
  assert whole(path) == 2.0


@pytest.mark.parametrize(
  "error",
  [
    OSError(28, "No space left on device"),
    ValueError("RESOURCE_EXHAUSTED: [a]: No space left on device\n" + "line\n" * 400),
  ],
  ids=["OSError", "of Orbax"],
)
def test_a_full_disk_is_one_short_error(tmp_path, monkeypatch, caplog, error):
  def fail(*args, **kwargs):
    logger = logging.getLogger("absl")
    for file in ("/lib/orbax/save.py", "/lib/other.py"):
      own = "own", logging.ERROR, file, 1, f"of {file}", (), None
      logger.handle(logger.makeRecord(*own))
    raise error

  monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
  with pytest.raises(OSError, match="No space left on device") as raised:
    save(tmp_path / "model", compiled())
  assert len(str(raised.value)) < 300
  assert caplog.messages == ["of /lib/other.py"]
  assert entries(tmp_path) == []


def test_what_orbax_writes_after_it_failed_is_removed_too(tmp_path, monkeypatch):
  own = shutil.rmtree

  def rmtree(folder, **options):
    monkeypatch.setattr(shutil, "rmtree", own)
    own(folder, **options)
    (folder / "arrays").mkdir(parents=True)

  def fail(folder, written):
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    raise OSError("No space left on device")

  monkeypatch.setattr(arrays, "write", fail)
  with pytest.raises(OSError, match="No space left"):
    save(tmp_path / "model", compiled())
  assert entries(tmp_path) == []


def test_who_may_read_follows_from_the_umask(tmp_path):
  before = os.umask(0o027)
  try:
    save(tmp_path / "new" / "model", compiled())
  finally:
    os.umask(before)
  for path in (tmp_path / "new").rglob("*"):
    mode = path.stat().st_mode & 0o777
    assert mode == (0o750 if path.is_dir() else 0o640), path


def test_a_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  save("~/model", compiled(4.0))
  assert whole(tmp_path / "model") == 4.0
  assert value_of(load("~/model", blank())) == 4.0


@pytest.mark.parametrize(
  "path", ["gs://bucket/model", "s3://bucket/model", pathlib.Path("gs://bucket/model")]
)
def test_remote_stores_are_refused(tmp_path, monkeypatch, path):
  monkeypatch.chdir(tmp_path)
  for refused in (lambda: save(path, compiled()), lambda: load(path, blank())):
    with pytest.raises(ValueError, match=r"path=.*expected a folder of a file system"):
      refused()
  assert entries(tmp_path) == []


def test_behind_a_link_the_model_itself_is_replaced(tmp_path):
  save(tmp_path / "model", compiled(1.0))
  (tmp_path / "latest").symlink_to("model")
  save(tmp_path / "latest", compiled(2.0), overwrite=True)
  assert (tmp_path / "latest").is_symlink()
  assert whole(tmp_path / "model") == 2.0


def test_other_formats_say_what_to_do(tmp_path):
  save(tmp_path / "model", compiled())
  file = tmp_path / "model" / "manifest.json"
  text = file.read_text()
  for number, advice in ((1, "compile again here"), (4, "update asap_jax here")):
    file.write_text(text.replace('"format": 3', f'"format": {number}'))
    with pytest.raises(ValueError, match=f"format {number}, written by.*{advice}"):
      load(tmp_path / "model", blank())


def test_a_model_of_format_2_is_replaced_by_one_of_today(tmp_path):
  path = pathlib.Path(shutil.copytree(old_model(), tmp_path / "model"))
  with pytest.raises(ValueError, match="elsewhere"):
    load(path, nnx.Dict(attend=asap_jax.sinkhorn_attention))
  save(path, compiled(2.0), overwrite=True)
  assert whole(path) == 2.0
  assert entries(path) == WHOLE
