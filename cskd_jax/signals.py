"""Turns SIGTERM and SIGINT into a request that the loop answers between two steps."""

import os
import signal


class StopRequest:
    """Context in which the first SIGTERM or Ctrl-C asks to stop; a second one ends the process at once.

    Attributes:
      requested: whether a signal came.
      name: of the signal.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested, self.name = False, ""

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        self.requested, self.name = True, signal.Signals(number).name
        # Not print: it may be what the signal has interrupted.
        os.write(2, f"\n{self.name}: saving after the current step; once more to end at once\n".encode())
        signal.signal(number, signal.SIG_DFL)
