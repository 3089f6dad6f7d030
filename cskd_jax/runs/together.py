"""Runs of a sweep that are carried out at once: what each of them logs, and what the person at the console sees."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from cskd_jax import console
from cskd_jax.errors import UserError, printable
from cskd_jax.files import open_append
from cskd_jax.runs.results import RESULTS
from cskd_jax.runs.run import Job, train_together
from cskd_jax.runs.sweep import LOG
from cskd_jax.training.callbacks import Callback, Console, Start

_LINE_SECONDS = 60.0


def carry_out(
    runs: Sequence[tuple[str, ml_collections.ConfigDict, pathlib.Path]], adapt_devices: bool = False
) -> list[Job]:
    """Carries out runs that agree in everything that determines the batches and the teacher; see `train_together`.

    Each run writes its messages to log.txt in its folder. The console shows the progress of all in one line per epoch.

    Args:
      runs: Name, configuration and folder of each run.
      adapt_devices: See `train_together`.

    Returns:
      The jobs, in the same order; those that failed have an `error`.
    """
    board = Board(len(runs))
    jobs = []
    for name, config, workdir in runs:
        workdir.mkdir(parents=True, exist_ok=True)
        say = _make_log(workdir / LOG)
        say(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {name}, one of {len(runs)} runs that share a teacher pass")
        jobs.append(Job(config, workdir, say, (Console(say=say), board.callback(name))))
    try:
        train_together(jobs, adapt_devices)
    except UserError as error:
        for job in jobs:
            if not (job.workdir / RESULTS).exists():
                job.error = job.error or error
        raise
    finally:
        for job in jobs:
            if job.error is not None:
                job.say(f"error: {printable(str(job.error))}")
    return jobs


def _make_log(path: pathlib.Path) -> Callable[[str], None]:
    """Returns a function that appends a line to a file, unless the disk is full, which should not end the training."""

    def say(message):
        with contextlib.suppress(OSError), open_append(path) as file:
            file.write(f"{message}\n")

    return say


class Board:
    """The progress of several runs on one console.

    Args:
      count: Number of runs.
      clock: Function that returns the time in seconds.
    """

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic):
        self._count, self._clock, self._last_line = count, clock, clock()
        self._running: dict[str, Start] = {}
        self._scores: dict[str, str] = {}
        self._paused = False
        self._announced: set[str] = set()  # Pauses since the last line.

    def callback(self, name: str) -> Callback:
        """Returns the callback of a run."""
        return _OnBoard(self, name)

    def pause(self, what: str) -> contextlib.AbstractContextManager:
        """Announces a pause that all runs have, once; all of them call their networks "student"."""
        what = what.removeprefix("student: ")
        # The runs are evaluated and saved one after the other, each in a pause of its own.
        if self._paused or (what in self._announced and not console.is_live()):
            return contextlib.nullcontext()
        return self._pause(what)

    @contextlib.contextmanager
    def _pause(self, what):
        self._paused = True
        self._announced.add(what)
        try:
            with console.pause(f"{console.counted(self._count, 'run')}: {what}"):
                yield
        finally:
            self._paused = False

    def start(self, name: str, start: Start) -> None:
        """Notes that a run is training."""
        if not self._running and start.together > 1:
            rest = self._count - start.together
            console.say(f"{start.together} runs train together" + (f", {rest} later, as memory allows" if rest else ""))
        self._running[name] = start

    def end(self, name: str) -> None:
        """Notes that a run is no longer training."""
        self._running.pop(name, None)

    def step(self, name: str, step: int) -> None:
        """Shows a line every minute."""
        now = self._clock()
        if now - self._last_line >= _LINE_SECONDS:
            self._say(f"{console.counted(len(self._running), 'run')}: {self._where(name, step)}")

    def evaluated(self, name: str, step: int, score: str) -> None:
        """Shows a line when all runs that are training have been evaluated."""
        self._scores[name] = score
        if self._running.keys() <= self._scores.keys():
            scores = ", ".join(f"{run} {self._scores[run]}" for run in self._running)
            self._say(f"{self._where(name, step)}: {scores}")
            self._scores.clear()

    def _say(self, line):
        console.say(line)
        self._last_line = self._clock()
        self._announced.clear()

    def _where(self, name, step):
        start = self._running[name]
        epoch, epochs = -(-step // start.steps_per_epoch), start.steps // start.steps_per_epoch
        speed = start.progress.images_per_second
        return f"epoch {epoch}/{epochs}" + ("" if speed is None else f", {speed:,.0f} images/s")


class _OnBoard(Callback):
    """The callback of one run."""

    def __init__(self, board: Board, name: str):
        self._board, self._name = board, name

    def pause(self, what: str) -> contextlib.AbstractContextManager:
        return self._board.pause(what)

    def on_start(self, start: Start) -> None:
        self._start, self._split = start, None
        self._board.start(self._name, start)

    def on_step(self, step: int, images: int, metrics: Mapping[str, float]) -> None:
        del images, metrics
        self._board.step(self._name, step)

    def on_row(self, row: Mapping[str, Any]) -> None:
        if row["split"] == "train":
            return
        # The first split that is evaluated is the one that chooses; the test split may follow before the next run.
        self._split = self._split or row["split"]
        if row["split"] == self._split:
            self._board.evaluated(self._name, row["step"], f"{row[self._start.task.score]:.4f}")

    def on_end(self) -> None:
        self._board.end(self._name)
