"""Files in folders that strangers may have filled: no link is followed, no text reaches a console as it is."""

import json
import os
import stat

import numpy as np
import pytest

from cskd_jax.commands.command_line import exit_code
from cskd_jax.errors import UserError, printable
from cskd_jax.files import open_append, refuse_links, write_bytes, write_json, write_text
from cskd_jax.main import main
from cskd_jax.report.runs import find_runs
from cskd_jax.runs import grid, lock, sweep
from cskd_jax.runs.results import write_results
from cskd_jax.training.callbacks import Progress, Start
from cskd_jax.training.metrics import SINGLE_LABEL
from cskd_jax.training.records import MetricsFiles
from tests.conftest import ROOT


@pytest.fixture
def outside(tmp_path):
    """A file of the user's that must not change."""
    path = tmp_path / "outside" / ".profile"
    path.parent.mkdir()
    path.write_text("export EDITOR=vi\n", encoding="utf-8")
    yield path
    assert path.read_text(encoding="utf-8") == "export EDITOR=vi\n"
    assert [file.name for file in path.parent.iterdir()] == [".profile"]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("write", [write_text, write_json, lambda path, text: write_bytes(path, text.encode())])
def test_writing_replaces_a_link(write, workdir, outside):
    for name in ("file", "file.tmp"):
        (workdir / name).symlink_to(outside)
    write(workdir / "file", "text")
    assert not (workdir / "file").is_symlink()
    assert "text" in (workdir / "file").read_text(encoding="utf-8")
    assert sorted(os.listdir(workdir)) == ["file", "file.tmp"]


def test_written_files_have_the_usual_permissions(workdir):
    old = os.umask(0o027)
    try:
        write_text(workdir / "new", "")
        open_append(workdir / "log").close()
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in workdir.iterdir()} == {0o640}


def test_what_cannot_be_written_leaves_the_old_file(workdir):
    write_json(workdir / "file", 1)
    (workdir / "folder").mkdir()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(workdir / "file", float("nan"))
    with pytest.raises(IsADirectoryError):
        write_json(workdir / "folder", 1)
    assert sorted(os.listdir(workdir)) == ["file", "folder"]
    assert (workdir / "file").read_text(encoding="utf-8") == "1\n"


def test_appending_adds_to_a_file_and_refuses_a_link(workdir, outside):
    for line in ("one\n", "two\n"):
        with open_append(workdir / "log") as file:
            file.write(line)
    assert (workdir / "log").read_text(encoding="utf-8") == "one\ntwo\n"
    (workdir / "link").symlink_to(outside)
    (workdir / "dangling").symlink_to(outside.with_name("new"))
    for name in ("link", "dangling"):
        with pytest.raises(UserError, match=f"{workdir / name} is a symbolic link"):
            open_append(workdir / name)


def test_links_are_found_at_any_depth(workdir, outside):
    (workdir / "student" / "checkpoints").mkdir(parents=True)
    (workdir / "student" / "checkpoints" / "file").touch()
    refuse_links([workdir / "student", workdir / "missing"])
    (workdir / "student" / "checkpoints" / "9").symlink_to(outside.parent)
    with pytest.raises(UserError, match="student/checkpoints/9 is a symbolic link"):
        refuse_links([workdir / "student"])


def test_folders_that_are_nested_too_deeply(workdir):
    (workdir / "student").joinpath(*"d" * 150).mkdir(parents=True)
    with pytest.raises(UserError, match="student holds folders that are nested more than 100 deep, the maximum"):
        refuse_links([workdir / "student"])
    with pytest.raises(UserError, match="nested more than 100 deep"):
        find_runs([workdir])


def test_lock(workdir, outside):
    (workdir / "lock").symlink_to(outside)
    with pytest.raises(UserError, match="lock is a symbolic link"), lock.locked(workdir / "lock", ""):
        pass


def test_metrics(workdir, outside):
    (workdir / "metrics.jsonl").symlink_to(outside)
    (workdir / "metrics.jsonl.tmp").symlink_to(outside)
    files = MetricsFiles(workdir)
    files.on_start(Start("student", 0, 1, 1, 0, 1, SINGLE_LABEL, Progress(), lambda _: None))
    files.on_end()
    assert not (workdir / "metrics.jsonl").is_symlink()


def test_results(workdir, outside):
    for name in ("results.json", "results.json.tmp", "confusion_matrix.csv"):
        (workdir / name).symlink_to(outside)
    write_results(workdir, {"seed": 0}, ["cat", "dog"], np.eye(2, dtype=int))
    assert json.loads((workdir / "results.json").read_text(encoding="utf-8")) == {"seed": 0}
    assert (
        workdir / "confusion_matrix.csv"
    ).read_bytes() == b"true class \\ predicted class,cat,dog\r\ncat,1,0\r\ndog,0,1\r\n"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, ".profile") for name in ("config.json", "metrics.jsonl", "confusion_matrix.csv", "lock")),
        *((name, "new") for name in ("config.json", "metrics.jsonl", "results.json", "lock")),
        *((name, "") for name in ("tensorboard", "tensorboard/student", "teacher", "student", "student/checkpoints")),
        ("student/checkpoints/3", ""),
    ],
)
def test_run_in_a_folder_with_a_link(name, target, workdir, outside, digits_dir, capsys):
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).symlink_to(outside.parent / target)
    arguments = [f"--config={ROOT}/configs/digits.py:ce", f"--config.dataset.data_dir={digits_dir}"]
    assert main(["main", *arguments, f"--workdir={workdir}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"{workdir / name} is" in error  # A link, or damaged where the run reads it first.


def test_results_that_are_a_link(workdir, outside, digits_dir, capsys):
    (workdir / "results.json").symlink_to(outside)
    arguments = [f"--config={ROOT}/configs/digits.py:ce", f"--config.dataset.data_dir={digits_dir}"]
    assert main(["main", *arguments, f"--workdir={workdir}"]) == 2
    assert f"error: {workdir / 'results.json'} is " in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_workdir_may_be_a_link(workdir, tmp_path, start, small_run):
    (tmp_path / "link").symlink_to(workdir)
    arguments = [f"{small_run[0]}:ce", *small_run[1:], "--config.epochs=1", f"--workdir={tmp_path / 'link'}"]
    _, error = (process := start(arguments)).communicate()
    assert process.returncode == 0, error
    assert (workdir / "results.json").exists()


@pytest.mark.parametrize("link", ["R18_0.25", "R18_0.25/kd-seed0"])
def test_sweep_in_a_folder_with_a_link(link, workdir, outside, digits_dir):
    (workdir / link).parent.mkdir(exist_ok=True)
    (workdir / link).symlink_to(outside.parent)
    run = grid.Run(workdir, "R18_0.25/kd-seed0", f"{ROOT}/configs/digits.py:ce", ())
    with pytest.raises(UserError, match=f"{link} is a symbolic link"):
        grid.check([run])


def test_output_of_a_sweep(workdir, outside):
    run, other = (grid.Run(workdir, name, "", ()) for name in ("kd-seed0", "ce-seed0"))
    run.workdir.mkdir()
    (run.workdir / "log.txt").symlink_to(outside)
    with pytest.raises(UserError, match="log.txt is a symbolic link"):
        sweep._Process([other, run], {})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("résumé → 日本 🐈", "résumé → 日本 🐈"),
        ("kd\nrm -rf", "kd\\nrm -rf"),
        ("a\r\tb\x85c\u2028d", "a\\r\\tb\\x85c\\u2028d"),
        ("\x1b]0;title\x07\x9b2J", "\\x1b]0;title\\x07\\x9b2J"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text, shown, capsys):
    def fail(argv):
        raise UserError(text)

    assert printable(text) == shown
    assert exit_code(fail, []) == 2
    assert capsys.readouterr().err == f"error: {shown}\n"
