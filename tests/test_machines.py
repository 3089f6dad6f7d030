"""Machines that lack something: a home folder, room on the disk, a terminal with a cursor, the right time."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from cskd_jax.commands import command_line
from cskd_jax.data import load_dataset
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder, write_json
from cskd_jax.runs import lock
from cskd_jax.training.callbacks import Progress, Start
from cskd_jax.training.metrics import SINGLE_LABEL
from cskd_jax.training.records import MetricsFiles
from tests import drift
from tests.conftest import ROOT


@pytest.fixture
def homeless(monkeypatch):
    """As in a container in which the user has a number that no file of users lists."""
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    assert command_line._cache_folder() is None
    assert (
        "compiled programs are not cached in ~/.cache/cskd_jax (no home folder); set XDG_CACHE_HOME to" in caplog.text
    )
    with pytest.raises(UserError, match="there is no home folder .*: set data_dir"):
        load_dataset("digits")
    for use in (local_folder, lambda path: load_dataset("image_folder", path=path)):
        with pytest.raises(UserError, match=r"~/runs: there is no home folder \(HOME is not set\); give the full path"):
            use("~/runs")
    assert local_folder("runs") == pathlib.Path("runs")
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_in_which_nothing_can_be_written(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert command_line._cache_folder() is None
    assert f"are not cached in {tmp_path}/file/.cache/cskd_jax (Not a directory); set XDG_CACHE_HOME to" in caplog.text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line._cache_folder() == str(tmp_path / ".cache" / "cskd_jax")


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 64 kB, and a function that fills it up to some bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"only root can make a small disk: {mounted.stderr.strip()}")

    def fill():
        with (folder / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    yield folder, fill
    subprocess.run(["umount", folder], check=True)


def test_results_on_a_full_disk(full_disk, capsys):
    """The old file stays, nothing else is left, and the message names the file."""
    folder, fill = full_disk
    write_json(folder / "results.json", {"old": 1})
    fill()
    assert command_line.exit_code(lambda _: write_json(folder / "results.json", {"new": "x" * 9000}), []) == 2
    assert capsys.readouterr().err == f"error: No space left on device: {folder}/results.json\n"
    assert json.loads((folder / "results.json").read_text()) == {"old": 1}
    assert {path.name for path in folder.iterdir()} == {"results.json", "ballast"}


def test_metrics_on_a_full_disk(full_disk, capsys):
    folder, fill = full_disk
    files = MetricsFiles(folder)
    files.on_start(Start("student", 0, 1, 1, 0, 1, SINGLE_LABEL, Progress(), lambda _: None))
    row = {"phase": "student", "split": "train", "step": 1, "epoch": 1, "loss": 1.0}
    fill()
    assert command_line.exit_code(lambda _: files.on_row(row), []) == 2
    assert capsys.readouterr().err == f"error: No space left on device: {folder}/metrics.jsonl\n"
    (folder / "ballast").unlink()
    files.on_row(row)
    files.on_end()
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == [row]


def test_a_lock_on_a_full_disk(full_disk):
    folder, fill = full_disk
    fill()
    message = f"cannot write to workdir {folder}: No space left on device"
    with pytest.raises(UserError, match=message), lock.locked(folder / "lock", ""):
        pass


@pytest.mark.parametrize("year", [1970, 2100])
def test_wrong_clocks(year, monkeypatch, tmp_path):
    """Files, locks and pauses go by differences, if by the time at all."""
    monkeypatch.setattr(time, "time", lambda: (year - 1970) * 31_556_952.0 + 10)
    with lock.locked(tmp_path / "run" / "lock", ""):
        files = MetricsFiles(tmp_path / "run")
        files.on_start(Start("student", 0, 1, 1, 0, 1, SINGLE_LABEL, Progress(), lambda _: None))
        files.on_row({"phase": "student", "split": "test", "step": 1, "epoch": 1, "top1": 0.5})
        files.on_end()
    (events,) = (tmp_path / "run" / "tensorboard" / "student").iterdir()
    assert events.stat().st_size > 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_without_streams_in_1970(start, small_run, done, tmp_path):
    """Standard input, output and error are closed, and the clock stands where it does without a battery."""
    clock = "import time\ntime.time = lambda now=time.time, start=time.time(): now() - start\n"
    (tmp_path / "sitecustomize.py").write_text(clock)
    program = ("bash", "-c", 'exec <&- >&- 2>&-; exec "$0" -m cskd_jax.main "$@"', sys.executable)
    arguments = [*small_run, f"--workdir={tmp_path / 'run'}"]
    process = start(arguments, program=program, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert drift.digest_of_run(tmp_path / "run") == drift.digest_of_run(done)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("JAX_NUM_CPU_DEVICES", "x", "JAX_NUM_CPU_DEVICES: JAX refuses the value ("),
        ("JAX_PLATFORMS", "nonsense", "JAX_PLATFORMS is 'nonsense', but JAX finds no such device; it must name "),
    ],
)
def test_variables_that_jax_refuses(name, value, line):
    code = """
import sys
from cskd_jax.commands.command_line import exit_code

def program(argv):
    from cskd_jax.distributed.devices import Devices
    Devices()

sys.exit(exit_code(program, []))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), name: value}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith(f"error: {line}")
    assert "Traceback" not in process.stderr
