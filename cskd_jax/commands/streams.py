"""Standard streams of a command that goes on when nobody reads them any more."""

import errno
import io
import os
import signal
import sys
from typing import Any, TextIO

# What writing to a closed pipe, and to a terminal that is gone, gives.
_GONE = (errno.EPIPE, errno.EIO)


class _LastingFile(io.FileIO):
    """A file whose reader may go away: what is written from then on is dropped."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def outlive_console() -> None:
    """Lets this process go on when its console goes away: `| head`, a lost connection, a closed terminal.

    What cannot be shown in the encoding of the console is written as an escape: a name should not end a run either.
    """
    for name in ("stdout", "stderr"):
        setattr(sys, name, _lasting(getattr(sys, name)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _lasting(stream: Any) -> TextIO:
    if stream is None:  # It was closed before the start, as `>&-` does.
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
