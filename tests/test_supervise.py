"""The supervisor, with shell scripts in the place of training."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cskd_jax.distributed.supervisor import Supervisor
from tests.conftest import ROOT


@pytest.fixture
def supervise(tmp_path):
    """Starts the supervisor on a shell script, whose $1, $2, ... are what the supervisor adds, in an empty folder."""
    processes = []

    def start(script, *flags):
        command = [sys.executable, "-m", "cskd_jax.supervise", *flags, "--", "sh", "-c", script, "script"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for_lines(path: pathlib.Path, count: int) -> list[str]:
    for _ in range(1000):
        if path.exists() and len(lines := path.read_text(encoding="utf-8").splitlines()) >= count:
            return lines
        time.sleep(0.01)
    raise AssertionError(f"{path} has not got {count} lines")


def test_starts_again_until_it_is_done(supervise, tmp_path):
    process = supervise("echo start >> starts; test $(wc -l < starts) = 3 || kill -9 $$", "--restarts=2")
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert "ended by SIGKILL" in error
    assert "restarting in 2 s (2 of 2)" in error
    assert len((tmp_path / "starts").read_text().split()) == 3


def test_a_lost_connection_ends_nothing(supervise, tmp_path):
    process = supervise("echo start >> starts; sleep 0.5; echo end >> ends")
    wait_for_lines(tmp_path / "starts", 1)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error
    assert (tmp_path / "ends").read_text() == "end\n"


def test_what_follows_the_dashes_is_the_command(tmp_path):
    command = [sys.executable, "-m", "cskd_jax", "supervise", "-restarts=1", "--grace", "3", "--"]
    arguments = ["-um", "-grace=3", "--help", "--processes=2"]
    process = subprocess.run(
        [*command, "sh", "-c", 'echo "$@"', "script", *arguments], cwd=ROOT, text=True, capture_output=True
    )
    assert (process.returncode, process.stdout) == (0, " ".join(arguments) + "\n"), process.stderr


@pytest.mark.parametrize(("ending", "code"), [("exit 7", 7), ("kill -9 $$", 128 + 9)])
def test_gives_up(supervise, tmp_path, ending, code):
    process = supervise(f"echo start >> starts; {ending}", "--restarts=1")
    _, error = process.communicate(timeout=20)
    assert process.returncode == code
    assert "giving up after 1 restarts" in error
    assert len((tmp_path / "starts").read_text().split()) == 2


@pytest.mark.parametrize("code", [2, 3, 75])
def test_not_tried_again(supervise, tmp_path, code):
    # The second process ends later and otherwise, as one does that has lost the first.
    script = 'echo "$@" >> starts; until test $(wc -l < starts) = 2; do sleep 0.01; done; '
    script += f"test $3 = --process=0 && exit {code}; sleep 0.3; exit 1"
    process = supervise(script, "--processes=2")
    process.communicate(timeout=20)
    assert process.returncode == code
    starts = [line.split() for line in (tmp_path / "starts").read_text().splitlines()]
    assert sorted(start[1:] for start in starts) == [["--processes=2", f"--process={i}"] for i in (0, 1)]
    assert len({start[0] for start in starts}) == 1
    assert starts[0][0].startswith("--coordinator=localhost:")


def test_ends_the_others_when_one_dies(supervise, tmp_path):
    """Even one that hangs and ignores SIGTERM."""
    script = "echo $$ >> pids; trap '' TERM; while test $3 = --process=1; do sleep 0.1; done; sleep 0.5; exit 9"
    process = supervise(script, "--processes=2", "--restarts=0")
    start = time.monotonic()
    _, error = process.communicate(timeout=20)
    assert process.returncode == 9
    assert "process 0 ended with exit code 9" in error
    assert time.monotonic() - start < 15
    for pid in (tmp_path / "pids").read_text().split():
        assert not pathlib.Path(f"/proc/{pid}").exists()


def test_passes_signals_on(supervise, tmp_path):
    script = "trap 'echo saved >> saved; exit 75' TERM; echo start >> starts; while true; do sleep 0.05; done"
    process = supervise(script, "--processes=2")
    wait_for_lines(tmp_path / "starts", 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert (tmp_path / "saved").read_text().split() == ["saved", "saved"]


@pytest.mark.parametrize(
    ("reaction", "code"),
    [("trap '' TERM", 128 + 9), ("trap 'exit 1' TERM", 1), ("", 75)],
    ids=["hangs", "fails while saving", "has nothing to save yet"],
)
def test_says_whether_all_was_saved(supervise, tmp_path, reaction, code):
    process = supervise(f"{reaction}\necho start >> starts; while true; do sleep 0.05; done", "--grace=0.5")
    wait_for_lines(tmp_path / "starts", 1)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == code
    assert (tmp_path / "starts").read_text().split() == ["start"]


def test_workers_die_with_it(supervise, tmp_path):
    process = supervise("echo $$ >> pids; while true; do sleep 0.05; done", "--processes=2")
    pids = wait_for_lines(tmp_path / "pids", 2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid):
    """A zombie, whom nobody has waited for yet, does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "-- COMMAND"),
        (["--"], "-- COMMAND"),
        (["--processes=0", "--", "true"], "'0'"),
        (["--restarts=x", "--", "true"], "'x'"),
        (["--", "/no/such"], "/no/such"),
        (["--processes=2", "--", "/"], "/"),
    ],
)
def test_bad_arguments(arguments, word):
    command = [sys.executable, "-m", "cskd_jax.supervise", *arguments]
    process = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    assert word in line


# Other tests of this process have computed with JAX; a supervisor never does.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_ends_the_first_where_the_second_cannot_be_started(monkeypatch):
    started, start = [], subprocess.Popen

    def start_one(*arguments, **options):
        if started:
            raise BlockingIOError("too many processes")
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start_one)
    with pytest.raises(BlockingIOError):
        Supervisor(["sh", "-c", "sleep 60"], processes=2, restarts=0, grace=1)._run_once()
    assert started[0].wait(timeout=5) == -signal.SIGKILL
