"""Executes the runs of a grid; runs that share a teacher are executed in one process."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from cskd_jax.console import counted, say
from cskd_jax.distributed.children import die_with_parent
from cskd_jax.distributed.devices import COUNT_FLAG
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, UserError, printable
from cskd_jax.files import open_append, refuse_links
from cskd_jax.inputs import open_regular
from cskd_jax.runs.grid import Run
from cskd_jax.runs.results import RESULTS, read_score

_POLL_SECONDS = 0.2
LOG, _ERROR = "log.txt", "error: "
_STOPPED = f"{_ERROR}stopped by "  # An `InterruptedRun`, which goes on where it stopped.
_LAST_BYTES = 10_000


class FailedRunsError(UserError):
    """Some runs of a sweep failed; the others are done."""

    exit_code = 1


def sweep(groups: Sequence[Sequence[Run]], jobs: int) -> None:
    """Runs everything that is not done, `jobs` groups at a time, and prints a line for each run that ends.

    Args:
      groups: Runs that are trained together; see `grid.group`.
      jobs: Number of groups at a time, each in a process of its own.

    Raises:
      FailedRunsError: Some runs failed; all others are done.
      InterruptedRun: A signal arrived; the runs have saved their state.
    """
    runs = [run for group in groups for run in group]
    waiting = [group for group in ([run for run in group if not run.done] for group in groups) if group]
    total, left = len(runs), sum(map(len, waiting))
    at_once = "" if jobs == 1 else f", {jobs} groups at a time"
    say(f"{counted(total, 'run')}, {total - left} done, {left} to go in {counted(len(waiting), 'group')}{at_once}")
    failed: dict[Run, str] = {}
    running: dict[int, _Process] = {}

    def report(run, outcome):
        over = sum(r.done for r in runs) + len(failed)
        say(f"[{over}/{total}] {run.name}: {outcome}")

    def fail(run, why):
        failed[run] = why
        report(run, why)

    with StopRequest() as stop:
        while waiting or running:
            if stop.requested:
                _stop(running)
                done = sum(run.done for run in runs)
                raise InterruptedRun(
                    f"stopped by {stop.name} with {done} of {total} runs done: the same command resumes the sweep"
                )
            for slot in set(range(jobs)) - running.keys():
                group = next(_ready(waiting), None)
                if group is not None:
                    waiting.remove(group)
                    running[slot] = _Process(group, device_variables(slot, jobs, os.environ))
            time.sleep(_POLL_SECONDS)
            for slot, process in list(running.items()):
                code = process.poll()
                for run in process.take_done():
                    report(run, f"{read_score(run.workdir / RESULTS)}, {time.monotonic() - process.start:.0f} s")
                if code is not None and not stop.requested:
                    del running[slot]
                    for run in process.left:
                        fail(run, _failure(run, code, process.log))
            for group in list(waiting):
                for run in list(group):
                    if run.teacher is not None and run.teacher in failed:
                        group.remove(run)
                        fail(run, f"not started: {run.teacher.name} failed")
                if not group:
                    waiting.remove(group)
    if failed:
        names = ", ".join(run.name for run in runs if run in failed)
        raise FailedRunsError(f"{len(failed)} of {total} runs failed: {names}; the same command retries them")
    say(f"all {counted(total, 'run')} done: cskd-jax report {runs[0].sweep}")


class _Process:
    """A process that carries out a group of runs, and ends when the sweep ends, however it ends.

    Args:
      group: Runs.
      variables: Environment variables of the process.

    Attributes:
      start: Its start time.
      log: File that receives its standard error, which is the log of its first run.
      left: Runs that are not known to be done.
    """

    def __init__(self, group: Sequence[Run], variables: Mapping[str, str]):
        self.start, self.left, self.log = time.monotonic(), list(group), group[0].workdir / LOG
        refuse_links(run.workdir / LOG for run in group)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open_append(self.log) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cskd_jax.commands.together"],
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stderr=log,
                text=True,
                # Its own process group, so that Ctrl-C reaches it only through the sweep and not twice.
                process_group=0,
                # Killed with the sweep, so that it does not keep writing where the next sweep writes.
                preexec_fn=die_with_parent,
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            json.dump([(run.name, run.recipe, run.overrides, str(run.workdir)) for run in group], stdin)

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        return self._process.poll()

    def take_done(self) -> list[Run]:
        """Removes the runs that have become done from `left` and returns them."""
        done = [run for run in self.left if run.done]
        self.left = [run for run in self.left if run not in done]
        return done

    def stop(self) -> None:
        """Asks the process to save and end."""
        self._process.terminate()

    def wait(self) -> None:
        """Waits for the process to end."""
        self._process.wait()


def device_variables(slot: int, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that give the run in `slot` of `jobs` its GPU, or one CPU device."""
    if jobs == 1:
        return {}
    # Each process would otherwise take three quarters of a GPU's memory when it starts.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
    if COUNT_FLAG not in environment.get("XLA_FLAGS", ""):
        variables["JAX_NUM_CPU_DEVICES"] = environment.get("JAX_NUM_CPU_DEVICES", "1")
    listed = [device for device in environment.get("CUDA_VISIBLE_DEVICES", gpus()).split(",") if device]
    return variables | ({"CUDA_VISIBLE_DEVICES": listed[slot % len(listed)]} if listed else {})


def gpus(devices: pathlib.Path = pathlib.Path("/dev")) -> str:
    """Returns the numbers of NVIDIA's GPUs that this machine or container has, such as "0,1"; "" if there are none."""
    count = sum(re.fullmatch(r"nvidia[0-9]+", path.name) is not None for path in devices.glob("nvidia*"))
    return ",".join(map(str, range(count)))


def _ready(waiting) -> Iterator[list[Run]]:
    return (group for group in waiting if all(run.teacher is None or run.teacher.done for run in group))


def _stop(running):
    for process in running.values():
        process.stop()
    for process in running.values():
        process.wait()


def _failure(run, code, log):
    """Returns why a run has failed: its own error, or else how the process that it ran in ended."""
    for path in (run.workdir / LOG, log):
        line = _last_line(path)
        if line.startswith(_ERROR):
            return f"FAILED: {line} ({path})"
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"FAILED, {how}: {line or 'no output'} ({log})"


def read_error(workdir: pathlib.Path) -> str | None:
    """Returns the error with which a run of a sweep ended, from its log; None if it ended without one, or goes on."""
    line = _last_line(workdir / LOG)
    return line.removeprefix(_ERROR) if line.startswith(_ERROR) and not line.startswith(_STOPPED) else None


def _last_line(log):
    """Returns the last line of a log; "" if there is none."""
    if not log.exists():
        return ""
    with open_regular(log, sys.maxsize) as file:  # It may be long.
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
        lines = file.read(_LAST_BYTES).decode("utf-8", errors="replace").strip().splitlines()
    return printable(lines[-1]) if lines else ""
