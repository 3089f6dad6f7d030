"""Messages, progress and warnings that people see while a command runs."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import tqdm

from cskd_jax.errors import printable

# What takes less is not worth a line when it comes again.
_LONG_SECONDS = 3

_muted = False
# How long each pause has lasted when it came last.
_seconds: dict[str, float] = {}


class _Handler(logging.Handler):
    """Shows what is logged, such as a warning of this package or of JAX, as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record."""
        cause = f": {record.exc_info[1]}" if record.exc_info else ""
        message = printable(record.getMessage() + cause)
        if record.levelno < logging.WARNING:
            say(message)
        else:
            level = "warning" if record.levelno < logging.ERROR else "error"
            tqdm.tqdm.write(f"{level}: {message}", file=sys.stderr)


def start(*, speaks: bool = True) -> None:
    """Prepares the console of a command; to be called before JAX is imported.

    What this package and JAX log is shown in one style, and of other libraries only errors. XLA's errors come as
    exceptions too: what its C++ code writes besides, such as a request to report a slow compilation, helps nobody here;
    only what it writes before it ends the process is shown.

    Args:
      speaks: Whether this process speaks to people; of several, only the first one does.
    """
    global _muted
    _muted = not speaks
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler())
    logging.getLogger("cskd_jax").setLevel(logging.INFO)
    # Orbax and tensorflow-datasets; what fails there is raised too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable


def _show_unraisable(unraisable):
    """Shows an error in a place from which none can be raised, but for those of a checkpoint that cannot be written.

    Then each of TensorStore's many parts fails once more in a thread of its own, because nobody waits for it anymore.
    """
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def mute() -> None:
    """Shows nothing from here on: of several processes, the first one alone speaks to people."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Prints text for the person at the console, above the progress bar if one is shown; each line is `printable`."""
    if not _muted:
        tqdm.tqdm.write("\n".join(map(printable, message.split("\n"))))
        sys.stdout.flush()


def is_live() -> bool:
    """Returns whether all is shown on a terminal, where a line can change; otherwise lines are all that is left."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not _is_dumb()


def _is_dumb() -> bool:
    """Returns whether the terminal can only add to its text, such as the one that Emacs is for a program."""
    return os.environ.get("TERM") == "dumb"


def progress_bar(total: int, initial: int, *, shown: bool = True) -> tqdm.tqdm:
    """Returns a bar on standard error, shown only on a terminal; its description stands before it."""
    # None: not shown where there is no terminal.
    disable = None if shown and not _muted and not _is_dumb() else True
    return tqdm.tqdm(
        total=total,
        initial=initial,
        bar_format="{desc} |{bar}|{percentage:3.0f}%",
        leave=False,
        disable=disable,
        dynamic_ncols=True,
    )


@contextlib.contextmanager
def pause(what: str) -> Iterator[None]:
    """A context in which something happens that may take a while.

    It is announced before it begins. On a terminal the seconds are counted until it is over; elsewhere it is a line.
    When it comes again, and was short, nothing is shown.

    Args:
      what: What happens, such as "student: compiling the training step".
    """
    start, known = time.monotonic(), what in _seconds
    with contextlib.ExitStack() as stack:
        if not _muted and _seconds.get(what, _LONG_SECONDS) >= _LONG_SECONDS:
            if is_live():
                stack.enter_context(_counted_seconds(what))
            else:
                say(f"{what} ...")
        yield
    _seconds[what] = time.monotonic() - start
    if not known and _seconds[what] >= _LONG_SECONDS:
        say(f"{what} took {duration(_seconds[what])}")


@contextlib.contextmanager
def _counted_seconds(what: str) -> Iterator[None]:
    over = threading.Event()
    line = tqdm.tqdm(bar_format="{desc} ... {elapsed}", desc=what, leave=False, dynamic_ncols=True)

    def count():
        while not over.wait(1):
            line.refresh()

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        line.close()


def duration(seconds: float) -> str:
    """Returns a duration for people, such as "5 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    seconds = round(seconds)
    minutes = round(seconds / 60)
    hours = minutes // 60
    if seconds < 120:
        return f"{seconds} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
