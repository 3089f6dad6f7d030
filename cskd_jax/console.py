"""Messages, progress and warnings that people see while a command runs."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import tqdm

from cskd_jax.errors import as_message, printable

# A pause that takes less is not worth a line when it occurs again.
_LONG_SECONDS = 3

_muted = False
# How long each pause lasted the last time.
_seconds: dict[str, float] = {}


class _Handler(logging.Handler):
    """Shows what is logged, such as a warning of this package or of JAX, as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record."""
        cause = f": {record.exc_info[1]}" if record.exc_info else ""
        message = as_message(record.getMessage() + cause)
        if record.levelno < logging.WARNING:
            say(message)
        else:
            level = "warning" if record.levelno < logging.ERROR else "error"
            tqdm.tqdm.write(f"{level}: {message}", file=sys.stderr)


def start(*, speaks: bool = True) -> None:
    """Prepares the console of a command; must be called before JAX is imported.

    Log messages of this package and of JAX are shown in one style; of other libraries, only errors are shown. XLA's
    errors are also raised as exceptions, and what its C++ code writes in addition, such as a request to report a slow
    compilation, helps nobody here; only what it writes before it ends the process is shown.

    Args:
      speaks: Whether this process speaks to people; of several processes, only the first one does.
    """
    global _muted
    _muted = not speaks
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    root = logging.getLogger()
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        root.addHandler(_Handler())
    logging.getLogger("cskd_jax").setLevel(logging.INFO)
    # Failures of Orbax and tensorflow-datasets are also raised as exceptions. asyncio is for the parts of a checkpoint
    # that fail on a full disk, after the first one has been raised.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unraisable


def _show_unraisable(unraisable):
    """Shows an error from a place that cannot raise any, except for those of a checkpoint that cannot be written.

    In that case, each of TensorStore's many parts fails again in its own thread, because nobody waits for it anymore.
    """
    if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def mute() -> None:
    """Shows nothing from here on: of several processes, only the first one speaks to people."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Prints text for the person at the console, above the progress bar if one is shown; each line is `printable`."""
    if not _muted:
        tqdm.tqdm.write("\n".join(map(printable, message.split("\n"))))
        sys.stdout.flush()


def is_live() -> bool:
    """Returns whether all output goes to a terminal, where a line can change; otherwise lines are all there is."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not _is_dumb()


def _is_dumb() -> bool:
    """Returns whether the terminal can only append text, like the one that Emacs provides for a program."""
    return os.environ.get("TERM") == "dumb"


def progress_bar(total: int, initial: int, *, shown: bool = True) -> tqdm.tqdm:
    """Returns a bar on standard error, shown only on a terminal, with its description in front of it."""
    # None hides the bar if there is no terminal.
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
    """Returns a context for something that may take a while.

    It is announced before it begins. On a terminal, the seconds are counted until it is over; elsewhere, a line is
    printed. When it occurs again, and was short, nothing is shown.

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
    line = tqdm.tqdm(bar_format="{desc} ... {elapsed}", desc=printable(what), leave=False, dynamic_ncols=True)

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
    """Returns a human-readable duration, such as "5 s", "12 min", "3 h 20 min", "2 d 4 h"."""
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


def counted(count: int, noun: str) -> str:
    """Returns a number with its noun: "1 epoch", "2 epochs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
