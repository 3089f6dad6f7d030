"""Turns SIGTERM and SIGINT into a request that the loop answers between two steps."""

import contextlib
import os
import signal
import threading
from typing import Any

from cskd_jax.distributed import processes

# Calls are counted from here, because JAX stops all processes at the largest number that any of them has passed to it,
# and Orbax passes it the steps that the first process saves.
_FIRST_CALL = 1 << 30


class StopRequest:
    """Context in which the first SIGTERM or Ctrl-C asks to stop; a second one ends the process at once.

    With several processes a signal to any one of them stops all after the same step; only SIGKILL ends one at once.

    Args:
      owns_process: Whether the process is that of a command. If not, a signal that is ignored remains so; a second
        signal does what it did before the context, and the first one does so at the end of the context.

    Attributes:
      requested: Whether a signal came.
      name: Name of the signal.
    """

    def __init__(self, owns_process: bool = True):
        self.requested, self.name, self._calls = False, "", _FIRST_CALL
        self._owns_process = owns_process
        self._previous: dict[int, Any] = {}

    def __enter__(self):
        handlers = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
        if threading.current_thread() is not threading.main_thread():
            handlers = {}  # Python allows handlers only in the main thread.
        elif processes.is_distributed():
            # JAX itself waits for SIGTERM, and tells the other processes.
            handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        if not self._owns_process:
            handlers = {number: handler for number, handler in handlers.items() if _can_be_passed_on(number)}
        self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested and not self._owns_process and not processes.is_distributed():
            signal.raise_signal(signal.Signals[self.name])

    def reached(self) -> bool:
        """Returns whether to stop before the next step; all processes must ask before every step."""
        self._calls += 1
        if not self.requested and processes.is_distributed() and processes.stop_agreed(self._calls):
            self.requested, self.name = True, signal.SIGTERM.name
        return self.requested

    def _handle(self, number, _frame):
        self.requested, self.name = True, signal.Signals(number).name
        message = f"\n{self.name}: saving after the current step or compilation; repeat to stop immediately\n"
        # The signal may have interrupted a print, which must not be called again.
        with contextlib.suppress(OSError):  # Nobody may be there to read it.
            os.write(2, message.encode())
        signal.signal(number, signal.SIG_DFL if self._owns_process else self._previous[number])


def _can_be_passed_on(number):
    """Returns whether a signal does anything now, and has a handler that Python can restore."""
    return signal.getsignal(number) not in (signal.SIG_IGN, None)
