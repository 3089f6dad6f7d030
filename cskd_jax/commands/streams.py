"""Standard streams of a command that continues when nobody reads them anymore."""

import errno
import io
import os
import signal
import sys
from typing import Any, TextIO

# Errors raised when writing to a closed pipe and to a terminal that is gone.
_GONE = frozenset({errno.EPIPE, errno.EIO})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _LastingFile(io.FileIO):
    """A file whose reader may go away; everything written after that is dropped."""

    dropping = _GONE

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self.dropping:
                raise
            return memoryview(data).nbytes


def outlive_console() -> None:
    """Lets this process continue when its console goes away: `| head`, a lost connection, a closed terminal.

    Characters that the console cannot encode are written as escapes, so that a name cannot end a run either.
    """
    _occupy_descriptors()
    for name in ("stdout", "stderr"):
        setattr(sys, name, _lasting(getattr(sys, name)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def outlive_full_disk() -> None:
    """Lets this process continue when the disk of the file that its console goes to is full.

    This is for commands whose results are in other files.
    """
    _LastingFile.dropping = _GONE | _FULL


def _occupy_descriptors():
    """Opens the standard streams that were closed before the start, or a file would take the place of one.

    The messages of libraries, which write to descriptor 2, would then go into that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # This takes the lowest that is free.
            os.set_inheritable(descriptor, True)


def _lasting(stream: Any) -> TextIO:
    if stream is None:  # It was closed before the start, as `>&-` does.
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    file = _LastingFile(stream.fileno(), "wb", closefd=False)
    # With PYTHONUNBUFFERED, nothing may wait in a buffer.
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
