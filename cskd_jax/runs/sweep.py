"""Execution of the runs of a grid, each in its own process."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from cskd_jax.console import say
from cskd_jax.distributed.children import die_with_parent
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, UserError, printable
from cskd_jax.files import open_append
from cskd_jax.inputs import open_regular
from cskd_jax.runs.grid import Run
from cskd_jax.runs.results import RESULTS, read_results
from cskd_jax.training.metrics import task_that_measured

_POLL_SECONDS = 0.2
_LAST_BYTES = 10_000


class FailedRunsError(UserError):
    """Some runs of a sweep failed; the others are done."""

    exit_code = 1


def sweep(runs: Sequence[Run], jobs: int) -> None:
    """Runs everything that is not done, `jobs` at a time, and prints a line for each run that ends.

    Raises:
      FailedRunsError: Some runs failed; all others are done.
      InterruptedRun: A signal arrived; the runs have saved their state.
    """
    waiting, total = [run for run in runs if not run.done], len(runs)
    say(f"{total} runs, {total - len(waiting)} done, {len(waiting)} to go, {jobs} at a time")
    failed: dict[Run, str] = {}
    running: dict[int, tuple[Run, subprocess.Popen, float]] = {}

    def report(run, outcome):
        over = sum(r.done for r in runs) + len(failed)
        say(f"[{over}/{total}] {run.name}: {outcome}")

    with StopRequest() as stop:
        while waiting or running:
            if stop.requested:
                _stop(running, stop)
            for slot in set(range(jobs)) - running.keys():
                run = next(_ready(waiting, failed), None)
                if run is not None:
                    waiting.remove(run)
                    running[slot] = run, _start(run, device_variables(slot, jobs, os.environ)), time.monotonic()
            time.sleep(_POLL_SECONDS)
            for slot, (run, process, start) in list(running.items()):
                if process.poll() is not None and not stop.requested:
                    del running[slot]
                    if not run.done:
                        failed[run] = _failure(run, process.returncode)
                    report(run, failed.get(run) or f"{_score(run)}, {time.monotonic() - start:.0f} s")
            for run in list(waiting):
                if run.teacher is not None and run.teacher in failed:
                    waiting.remove(run)
                    failed[run] = f"not started: {run.teacher.name} failed"
                    report(run, failed[run])
    if failed:
        names = ", ".join(run.name for run in runs if run in failed)
        raise FailedRunsError(f"{len(failed)} of {total} runs failed: {names}; the same command tries them again")
    say(f"all {total} runs done: cskd-jax report {runs[0].sweep}")


def device_variables(slot: int, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that give the run in `slot` of `jobs` its share of the GPUs."""
    if jobs == 1:
        return {}
    # Each process would otherwise take three quarters of a GPU's memory when it starts.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
    listed = [device for device in environment.get("CUDA_VISIBLE_DEVICES", gpus()).split(",") if device]
    return variables | ({"CUDA_VISIBLE_DEVICES": listed[slot % len(listed)]} if listed else {})


def gpus(devices: pathlib.Path = pathlib.Path("/dev")) -> str:
    """Returns the numbers of NVIDIA's GPUs that this machine or container has, such as "0,1"; "" without any."""
    count = sum(re.fullmatch(r"nvidia[0-9]+", path.name) is not None for path in devices.glob("nvidia*"))
    return ",".join(map(str, range(count)))


def _ready(waiting, failed) -> Iterator[Run]:
    return (run for run in waiting if run.teacher not in failed and (run.teacher is None or run.teacher.done))


def _start(run, variables):
    """Starts a run, which ends when the sweep ends, however it ends."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cskd_jax.main", *run.arguments]
    with open_append(run.workdir / "log.txt") as log:
        return subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            # Its own process group, so that Ctrl-C reaches it only through the sweep and not twice.
            process_group=0,
            # Killed with the sweep, so that it does not go on writing where the next sweep writes.
            preexec_fn=die_with_parent,
        )


def _stop(running, stop):
    for _, process, _ in running.values():
        process.terminate()
    for _, process, _ in running.values():
        process.wait()
    raise InterruptedRun(f"stopped by {stop.name}, {len(running)} runs are saved: the same command goes on")


def _failure(run, code):
    lines = _last_part(run.workdir / "log.txt").decode("utf-8", errors="replace").strip().splitlines()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"FAILED, {how}: {printable(lines[-1]) if lines else 'no output'} ({run.workdir / 'log.txt'})"


def _last_part(path):
    """Returns the last bytes of a log, which may be long."""
    with open_regular(path, sys.maxsize) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LAST_BYTES))
        return file.read(_LAST_BYTES)


def _score(run):
    last = read_results(run.workdir / RESULTS)["student"]["last"]
    return f"last {task_that_measured(last).describe(last)}"
