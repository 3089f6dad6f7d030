"""Starts a command again when one of its processes dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from cskd_jax.distributed.children import die_with_parent
from cskd_jax.errors import DivergedError, InterruptedRun, UserError

# Exit codes of runs that would end in the same way again.
_FINAL = (UserError.exit_code, DivergedError.exit_code)
_END_SECONDS = 3
_POLL_SECONDS = 0.05
_LONG_SECONDS = 600
_MAX_DELAY_SECONDS = 60


class Supervisor:
    """A supervisor that starts a command again until it ends in a way that another start would not fix.

    Args:
      command: Command and its arguments.
      processes: Number of processes of the command to start.
      restarts: Number of restarts in a row.
      grace: Seconds from a request to stop to SIGKILL.
    """

    def __init__(self, command: Sequence[str], processes: int, restarts: int, grace: float):
        self._command, self._processes, self._restarts, self._grace = list(command), processes, restarts, grace
        self._signals = 0

    def run(self) -> int:
        """Runs the command and returns its exit code.

        The code is that of the process that failed, or that of an interrupted run if a signal asked to stop.
        """
        for request in (signal.SIGTERM, signal.SIGINT):
            signal.signal(request, self._count_signal)
        failures = 0
        while True:
            start = time.monotonic()
            codes = self._run_once()
            code = self._exit_code(codes)
            if self._signals or code in (0, InterruptedRun.exit_code, *_FINAL):
                return code
            failures = 1 if time.monotonic() - start > _LONG_SECONDS else failures + 1
            if failures > self._restarts:
                _say(f"giving up after {failures - 1} restarts in a row")
                return code
            delay = min(2 ** (failures - 1), _MAX_DELAY_SECONDS)
            _say(f"restarting in {delay} s ({failures} of {self._restarts})")
            self._wait(lambda: False, delay)
            if self._signals:
                return InterruptedRun.exit_code

    def _run_once(self):
        """Starts the processes, waits for their end, and returns their exit codes, in the order of ending."""
        workers, codes = [], {}
        try:
            for command in self._commands():
                workers.append(subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent))
            self._wait(lambda: _failed(_collect(workers, codes)) or len(codes) == len(workers), None)
            self._end(workers, codes)
        finally:
            _signal_groups(workers, signal.SIGKILL)
        return list(codes.values())

    def _commands(self):
        if self._processes == 1:
            return [self._command]
        shared = [f"--coordinator=localhost:{_free_port()}", f"--processes={self._processes}"]
        return [[*self._command, *shared, f"--process={index}"] for index in range(self._processes)]

    def _end(self, workers, codes):
        """Ends the remaining processes: with time for saving if the whole job is to stop, quickly otherwise."""
        for index, code in codes.items():
            if code not in (0, InterruptedRun.exit_code):
                _say(f"process {index} ended {_describe(code)}")
        if len(codes) == len(workers):
            return
        stopping = self._signals or InterruptedRun.exit_code in codes.values()
        if self._signals or not stopping:
            _signal_groups(workers, signal.SIGTERM)
        begin, signals = time.monotonic(), self._signals
        seconds = self._grace if stopping else _END_SECONDS
        while len(_collect(workers, codes)) < len(workers):
            # If one dies while the job is stopping, the others would wait for it in vain.
            late = time.monotonic() - begin > (_END_SECONDS if _failed(codes) else seconds)
            if late or self._signals > max(signals, 1):
                _signal_groups(workers, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        _say(f"the others ended after {time.monotonic() - begin:.1f} s")

    def _wait(self, is_over, seconds):
        """Waits until `is_over()`, until a signal arrives, or until time is up."""
        begin = time.monotonic()
        while not is_over() and not self._signals and (seconds is None or time.monotonic() - begin < seconds):
            time.sleep(_POLL_SECONDS)

    def _exit_code(self, codes):
        for code in _FINAL:
            if code in codes:
                return code
        if set(codes) == {0}:
            return 0
        # SIGTERM ends a process that has nothing to save yet; a process that ends with 75 knows that all is saved.
        harmless = (0, -signal.SIGTERM) if self._signals else (0,)
        failed = [code for code in codes if code not in harmless]
        if InterruptedRun.exit_code in codes or not failed:
            return InterruptedRun.exit_code
        return 128 - failed[0] if failed[0] < 0 else failed[0]

    def _count_signal(self, *_):
        self._signals += 1


def _collect(workers, codes):
    """Adds the exit codes of processes that have ended to {index: code}, and returns it."""
    for index, worker in enumerate(workers):
        if index not in codes and worker.poll() is not None:
            codes[index] = worker.returncode
    return codes


def _failed(codes):
    return any(codes.values())


def _signal_groups(workers, which):
    """Sends a signal to the workers that are still running, and to all the processes that they have started."""
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, which)


def _free_port():
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _describe(code):
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _say(message):
    print(f"supervise: {message}", file=sys.stderr, flush=True)
