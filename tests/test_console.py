"""What people see: lines in a file, a bar and counted seconds on a terminal, and no words of other libraries."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
import types

import jax.numpy as jnp
import pytest

from cskd_jax import console
from cskd_jax.commands.train import _is_first
from cskd_jax.data import load_dataset
from cskd_jax.distributed import processes
from cskd_jax.errors import DivergedError
from cskd_jax.training.callbacks import Console, Meter, Progress, Start
from cskd_jax.training.metrics import MULTI_LABEL, SINGLE_LABEL
from tests.conftest import ROOT


class Terminal(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        """Returns True."""
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Returns a function that makes terminals of the standard output and error, and returns them."""

    def use(kind="xterm"):
        monkeypatch.setenv("TERM", kind)
        streams = Terminal(), Terminal()
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        return streams

    return use


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(console, "_seconds", {})
    monkeypatch.setattr(console, "_muted", False)


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        """Returns the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, clock)
    return clock


def test_a_pause_is_a_line_before_it_begins(capsys, clock):
    with console.pause("student: evaluating"):
        assert capsys.readouterr() == ("student: evaluating ...\n", "")
        clock.now += 2
    assert capsys.readouterr() == ("", "")


def test_a_pause_that_was_short_is_not_announced_again(capsys, clock):
    for seconds in (2, 5, 5):
        with console.pause("student: evaluating"):
            clock.now += seconds
    assert capsys.readouterr().out.splitlines() == ["student: evaluating ..."] * 2


def test_the_first_long_pause_says_how_long_it_took(capsys, clock):
    for _ in range(2):
        with console.pause("student: compiling"):
            clock.now += 84
    assert capsys.readouterr().out.splitlines() == [
        "student: compiling ...",
        "student: compiling took 84 s",
        "student: compiling ...",
    ]


def test_seconds_are_counted_on_a_terminal(terminal):
    output, error = terminal()
    with console.pause("compiling"):
        deadline = time.monotonic() + 10
        while not re.search("compiling ... 00:0[1-9]", error.getvalue()) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "compiling ... 00:00" in error.getvalue()
    assert re.search("compiling ... 00:0[1-9]", error.getvalue())
    assert not error.getvalue().rstrip("\r").split("\r")[-1].strip(), "nothing is left of it"
    assert output.getvalue() == ""


def test_what_is_counted_is_printable(terminal):
    _, error = terminal()
    with console.pause("\x1b]0;x\x07compiling"):
        assert r"\x1b]0;x\x07compiling ... 00:00" in error.getvalue()


def test_counting_ends_with_an_error(terminal):
    terminal()
    during = []

    def fail():
        with console.pause("compiling"):
            during.extend(thread for thread in threading.enumerate() if "(count)" in thread.name)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert len(during) == 1
    assert not during[0].is_alive()


def test_other_processes_are_mute(terminal):
    streams = terminal()
    console.mute()
    console.say("one line")
    with console.pause("compiling"):
        pass
    console.progress_bar(10, 0).refresh()
    assert [stream.getvalue() for stream in streams] == ["", ""]


def test_a_dumb_terminal_has_lines_only(terminal):
    """Such as that of Emacs, in which a line cannot change."""
    output, error = terminal("dumb")
    with console.pause("compiling"):
        console.progress_bar(10, 0).refresh()
    assert (output.getvalue(), error.getvalue()) == ("compiling ...\n", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (12000, "3 h 20 min"),
        (86399, "1 d 0 h"),
        (187200, "2 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def train(clock, *, task=SINGLE_LABEL, seconds=10.0, learning_rate=lambda step: 0.1 / step, callback=None):
    """Trains for 2 epochs of 12 steps with 10 images, of which each takes some seconds, as each evaluation does."""
    progress = Progress()
    start = Start("student", 0, 24, 12, 0, 240, task, progress, learning_rate)
    with Meter(start, [callback or Console(clock)], 50) as meter:
        for step in range(1, 25):
            if step % 12 == 1:
                meter.start_clock()
            clock.now += seconds
            metrics = {"loss": jnp.float32(1 + step), task.score: jnp.float32(0.5)}
            meter.add(step, 10, metrics)
            if step % 12 == 0:
                clock.now += seconds
                meter.end_epoch(step, "test", {task.score: 0.25, "loss": 2.0})
    return meter


def test_lines_of_a_file(capsys, clock):
    train(clock)
    assert capsys.readouterr() == (
        "student: epoch 1/2, step 6/24, loss 4.5000, train top-1 0.5000, "
        "learning rate 0.01667, 1 images/s, 3 min left\n"
        "student: epoch 1/2, step 12/24, loss 7.5000, train top-1 0.5000, "
        "learning rate 0.008333, 1 images/s, 2 min left\n"
        "student: epoch 1/2, train loss 7.5000, test loss 2.0000, test top-1 0.2500, 1 images/s, 2 min left\n"
        "student: epoch 2/2, step 17/24, loss 16.0000, train top-1 0.5000, "
        "learning rate 0.005882, 1 images/s, 70 s left\n"
        "student: epoch 2/2, step 23/24, loss 19.0000, train top-1 0.5000, "
        "learning rate 0.004348, 1 images/s, 10 s left\n"
        "student: epoch 2/2, train loss 19.5000, test loss 2.0000, test top-1 0.2500, 1 images/s\n",
        "",
    )


def test_without_labels_only_the_loss_is_shown(capsys, clock):
    start = Start("student", 0, 24, 12, 0, 240, SINGLE_LABEL, Progress(), lambda step: 0.1)
    with Meter(start, [Console(clock)], 50) as meter:
        meter.start_clock()
        clock.now += 60
        meter.add(1, 10, {"loss": jnp.float32(1)})
    assert capsys.readouterr().out.startswith("student: epoch 1/2, step 1/24, loss 1.0000, learning rate 0.1")


def test_only_the_total_and_its_gradient_must_be_finite(clock):
    """A term of a loss that is switched off may be infinite; it is not in the row of such a step."""
    start = Start("student", 0, 24, 2, 0, 240, SINGLE_LABEL, Progress(), lambda step: 0.1)
    with Meter(start, [Console(clock)], 50) as meter:
        for step, off in enumerate((1.0, jnp.inf, jnp.nan, 1.0, 2.0, 4.0), start=1):
            meter.add(step, 10, {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1), "off": jnp.float32(off)})
        for name in ("loss", "gradient_norm"):
            metrics = {"loss": jnp.float32(1), "gradient_norm": jnp.float32(1)} | {name: jnp.float32(jnp.nan)}
            with pytest.raises(DivergedError, match=f"student: {name} is nan at step 7"):
                meter.add(7, 10, metrics)
    assert [row.get("off") for row in meter.history] == [None, None, 3.0]


def test_the_learning_rate_is_that_of_the_history(capsys, clock):
    meter = train(clock, seconds=60.0)
    rows = {row["step"]: row["learning_rate"] for row in meter.history if row["split"] == "train"}
    lines = capsys.readouterr().out.splitlines()
    for step, rate in rows.items():
        (line,) = [line for line in lines if f"step {step}/24" in line]
        assert f"learning rate {rate:.4g}," in line


def test_short_epochs_have_one_line_each(capsys, clock):
    train(clock, seconds=1.0, task=MULTI_LABEL, learning_rate=lambda step: None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["student: epoch 1/2", "student: epoch 2/2"]
    assert "test mean average precision 0.2500" in lines[0]


def test_the_evaluations_to_come_count_as_time_left(capsys, clock):
    class SlowEvaluation(Console):
        def on_row(self, row):
            clock.now += 3600 if row["split"] == "test" and row["epoch"] == 2 else 0
            super().on_row(row)

    progress = Progress()
    start = Start("student", 0, 3, 1, 0, 30, SINGLE_LABEL, progress, lambda _: None)
    with Meter(start, [SlowEvaluation(clock)], 50) as meter:
        for step in (1, 2):
            meter.start_clock()
            clock.now += 10
            meter.add(step, 10, {"loss": jnp.float32(1), "top1": jnp.float32(0.5)})
            meter.end_epoch(step, "test", {"top1": 0.25, "loss": 2.0})
    assert capsys.readouterr().out.splitlines()[1].endswith("1 images/s, 1 h 0 min left")


def test_a_terminal_has_a_bar_and_no_line_a_minute(terminal, clock):
    output, error = terminal()
    train(clock)
    lines = [line for line in output.getvalue().splitlines() if line.strip()]
    assert [line.partition(", ")[0] for line in lines] == ["student: epoch 1/2", "student: epoch 2/2"]
    bar = error.getvalue()
    assert "student: epoch 1/2, loss 4.5000, train top-1 0.5000, learning rate 0.01667, 1 images/s, 3 min left |" in bar
    assert "%" in bar


def test_a_resumed_run_has_the_speed_of_its_own_start(capsys, clock):
    progress = Progress(images=1000, seconds=1.0)
    start = Start("student", 12, 24, 12, 120, 240, SINGLE_LABEL, progress, lambda _: None)
    with Meter(start, [Console(clock)], 50) as meter:
        meter.start_clock()
        clock.now += 60
        meter.add(13, 10, {"loss": jnp.float32(1), "top1": jnp.float32(0.5)})
    assert capsys.readouterr().out.endswith("0 images/s, 11 min left\n")


def test_sums_of_earlier_versions_have_the_name_of_today():
    assert Progress(sums={"loss": 1.0, "accuracy": 0.5}).sums == {"loss": 1.0, "top1": 0.5}


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    root, absl, own = logging.getLogger(), logging.getLogger("absl"), logging.getLogger("cskd_jax")
    parts = logging.getLogger("asyncio")
    before = root.handlers[:], absl.level, own.level, parts.level
    try:
        for _ in range(2):
            console.start()
        own.getChild("training").warning("checkpoint %s is damaged\n(twice)", "3")
        own.getChild("data").info("downloading")
        logging.getLogger("jax._src.xla_bridge").warning("no GPU found")
        absl.warning("words of Orbax")
        parts.error("Task exception was never retrieved")
        logging.getLogger("jax").error("long" * 1000)
        try:
            raise OSError("full")
        except OSError:
            logging.getLogger("jax").exception("cannot start")
    finally:
        root.handlers = before[0]
        absl.setLevel(before[1])
        own.setLevel(before[2])
        parts.setLevel(before[3])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "1", "who asks for the words of XLA gets them"
    assert capsys.readouterr() == (
        "downloading\n",
        "warning: checkpoint 3 is damaged\\n(twice)\nwarning: no GPU found\n"
        f"error: {('long' * 500)[:-1]}…\nerror: cannot start: full\n",
    )


def test_what_tensorstore_says_of_a_full_disk_is_left_out(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "__unraisablehook__", lambda unraisable: shown.append(str(unraisable.exc_value)))
    console.start()
    for owner, text in ((None, "Event loop is closed"), (None, "other"), (console, "Event loop is closed")):
        sys.unraisablehook(types.SimpleNamespace(object=owner, exc_value=RuntimeError(text)))
    assert shown == ["other", "Event loop is closed"]


@pytest.mark.slow
def test_data_are_prepared_without_words_of_other_libraries(tmp_path, capfd, caplog):
    with caplog.at_level("INFO", logger="cskd_jax"):
        load_dataset("digits", data_dir=str(tmp_path))
    assert caplog.messages == [f"preparing the data set digits in {tmp_path}/digits/1.0.0"]
    assert capfd.readouterr() == ("", "")


def test_processes_connect_without_words(capfd, monkeypatch):
    """What C++ code prints does not go through `sys.stdout`."""
    monkeypatch.setattr(processes.multihost_utils, "sync_global_devices", lambda _: os.write(1, b"[Gloo]\n"))
    print("before")
    processes._connect()
    print("after")
    assert capfd.readouterr() == ("before\nafter\n", "")


@pytest.mark.parametrize(
    ("process", "environment", "expected"),
    [
        (None, {}, True),
        (0, {"SLURM_PROCID": "1"}, True),
        (1, {}, False),
        (None, {"SLURM_PROCID": "0"}, True),
        (None, {"SLURM_PROCID": "3"}, False),
        (None, {"TPU_WORKER_ID": "2"}, False),
        (None, {"TPU_WORKER_ID": ""}, True),
    ],
)
def test_the_first_process_is_known_before_jax(process, environment, expected, monkeypatch):
    for name in ("SLURM_PROCID", "TPU_WORKER_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _is_first(process) is expected


FIRST_LINE = """
import sys
class Stop:
    def find_spec(self, name, *_):
        if name in ("jax", "jaxlib", "tensorflow", "tensorflow_datasets"):
            sys.exit("import of " + name)
sys.meta_path.insert(0, Stop())
from cskd_jax.main import main
main(["main", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--config=digits:kd"], "loading JAX to train digits:kd ...\n"),
        (["--config=digits:kd", "--coordinator=localhost:1", "--processes=2", "--process=1"], ""),
    ],
)
def test_the_first_line_comes_before_jax(arguments, output):
    command = [sys.executable, "-c", FIRST_LINE, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (output, "import of jax\n")
